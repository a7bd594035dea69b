"""The checks of `grpo doctor`: the machine, the packages, the services, and the folders that a run needs."""
