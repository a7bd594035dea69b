"""Accuracy on held-out prompts: evaluator, majority votes, and intervals."""
