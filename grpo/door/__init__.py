"""What `import grpo` gives to Python users: `grpo/__init__.py` names it, and imports it when it is first used."""
