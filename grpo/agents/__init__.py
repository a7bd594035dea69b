"""Agents: programs that drive the model themselves, through an OpenAI-compatible endpoint, and train it."""
