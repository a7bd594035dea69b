"""Task sources: rows of a dataset become prompts, in a shuffled stream with a cursor."""
