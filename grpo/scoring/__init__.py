"""Runs reward functions and records their scores and failures."""
