"""The batched generator: many prompts, many completions of each, through a fixed number of slots."""
