"""Alarms about a run that goes wrong: rules over a short history of its metrics, each reported once."""
