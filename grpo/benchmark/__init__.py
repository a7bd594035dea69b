"""The benchmarks of `grpo bench`, and their measurement protocol."""
