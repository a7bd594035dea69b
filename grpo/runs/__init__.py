"""A run on disk and around the steps: its folder, checkpoints, resuming, signals, and the loop."""
