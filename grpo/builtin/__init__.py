"""A task and a model that need no network: what the quickstart trains on, and what tests use."""
