"""A student that is made in a second, under the name of the real one, in a process of its own."""

PATCH = """
from grpo.builtin import models
models.MODELS["builtin:arithmetic-student"] = models.Student(steps=2, warmup=1)
"""
