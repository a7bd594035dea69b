"""Who is told what a run measures: the terminal, files, W&B. A logger is one method, `log(record)`."""
