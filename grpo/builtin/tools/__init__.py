"""Bundled tools, each in the file of its name: `tools: [calculator, python]`. Docstrings are what the model reads."""
