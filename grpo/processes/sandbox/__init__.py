"""Runs untrusted code in isolation. The manual's page on the sandbox lists the guarantees."""
