"""Environments, which turn a task into trajectories, and the sampler that they use."""
