"""The Python API. `grpo/__init__.py` lists its names, and imports each when it is first used."""
