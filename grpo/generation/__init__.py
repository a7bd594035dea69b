"""The batched generator: several completions for each of many prompts, through a fixed number of slots."""
