"""What commands do with a run: generate, serve, evaluate, export, card, replay, rescore."""
