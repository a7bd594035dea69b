"""What MkDocs asks while it builds the manual."""
