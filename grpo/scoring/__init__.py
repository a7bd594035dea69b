"""Runs reward functions, and records what they answer and where they fail."""
