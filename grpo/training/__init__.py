"""The trainer: one step, the update, evaluation, checkpoints, and the run around them."""
