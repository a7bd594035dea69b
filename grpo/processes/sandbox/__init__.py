"""Runs code that nobody has read, where it can do no harm. What is guaranteed, and what is not, is in the README."""
