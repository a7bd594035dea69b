"""Conversations whose every token is known beforehand: what is said, what ends them, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import mlx.core as mx
import pytest
from environments.conversing import Host, Numbers, at_once

from grpo.backend.random import derive_seed
from grpo.environments.conversations import Conversations
from grpo.environments.openings import messages_of, with_added
from grpo.environments.play import Table
from grpo.environments.sampler import common_prefix
from grpo.environments.seats import Limits, Reply
from grpo.errors import RunError, UserError
from grpo.generation.generator import Generator
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import BEHAVIOUR, Failure, Group, Task, Trajectory

VOCABULARY, STOPS = 80, range(8)
PROMPT = (11, 20, 21)
TASK = Task(4, [{"role": "user", "content": "20 21"}], PROMPT, {"answer": "42"})
CALL, OTHER, END, NO_END = 60, 61, 1, 2  # tokens: of two tools' calls, of a turn's end, and of an end that is none


class Scripted(mx.array.__class__ if False else object):
    """Placeholder, replaced below."""


def engine_of(script: Callable[[Sequence[int]], int], sampling: Sampling, slots: int = 64) -> Generator: ...
