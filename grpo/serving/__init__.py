"""A model and its adapters behind an OpenAI-compatible endpoint, decoded by the trainer's own generator."""
