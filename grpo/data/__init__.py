"""Where tasks come from: rows of a dataset, made into prompts, as a shuffled stream with a cursor."""
