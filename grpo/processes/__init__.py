"""Processes of our own for code of other people: started, watched, ended; and the sandbox."""
