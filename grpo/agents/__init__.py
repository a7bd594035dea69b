"""Agents: programs that call the model through an OpenAI-compatible endpoint while it is trained on their calls."""
