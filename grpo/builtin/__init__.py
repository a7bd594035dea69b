"""Built-in tasks, and a model for each task, that need no network. The quickstart and the tests use them."""
