"""The algorithm: one step, its batches, passes and update, the optimizer, schedules and metrics."""
