"""Bundled tools, one per file: `tools: [calculator, python]`. The model reads the docstrings of the tool functions."""
