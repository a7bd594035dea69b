"""Worker processes for other people's code: start, monitoring, end; and the sandbox."""
