"""How a task becomes trajectories: environments, and what they sample with."""
