"""The model that samples and trains: loading, LoRA states, token logprobs without full logits."""
