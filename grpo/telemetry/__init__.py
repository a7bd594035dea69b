"""Loggers for the records of a run: terminal, files, W&B, TensorBoard, Trackio. A logger has one method,
`log(record)`."""
