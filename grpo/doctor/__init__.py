"""What `grpo doctor` looks at: the machine, the packages, the services and the folders that a run needs."""
