"""Runs in conversations: resumed to the bit, stopped in a call, rehearsed, replayed, and never left behind."""

import os
import signal
import time
from pathlib import Path

import pytest
from runs.conversing import conversing  # noqa: F401
from runs.driver import run, same_end
from runs.test_resume import interrupt_in

from grpo.errors import UserError
from grpo.runs.completions import read_completions, stored_steps


def talks(folder: str) -> list:
    rows = [rollout for path in stored_steps(Path(folder) / "completions") for g in read_completions(path)[1] for rollout in g.rollouts]
    return [row.trajectory for row in rows]


def test_resume(conversing: Path) -> None:
    run(conversing, "output_dir=whole")
    t = talks("whole")
    print([(x.conversation.calls, len(x.conversation.messages), x.finish_reason, x.conversation.outcome) for x in t])
    run(conversing, "output_dir=parts", change=interrupt_in(3, "rollout"))
    run(conversing, "output_dir=parts", resume=True)
    same_end(Path("whole"), Path("parts"))
    assert 0
