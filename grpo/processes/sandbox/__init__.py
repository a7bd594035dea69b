"""Runs code that nobody has read, where it can do no harm. The manual's page on the sandbox has the guarantees."""
