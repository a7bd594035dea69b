"""A run that goes wrong says so: rules over a short history of its metrics, each told once."""
