"""Tasks, and a model for each, that need no network: what the quickstart trains on, and what tests use."""
