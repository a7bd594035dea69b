"""What commands do with a finished run: generate, evaluate, export, card, replay, rescore."""
