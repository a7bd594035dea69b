"""The measuring protocols behind `grpo bench`."""
