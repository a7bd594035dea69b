"""Accuracy on held-out prompts: the evaluator, majority votes, and intervals."""
