"""Serves a model and its adapters at an OpenAI-compatible endpoint, decoded by the trainer's own generator."""
