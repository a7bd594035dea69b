"""What a run will need, and whether its sampler and its trainer agree, before it starts."""
