"""What workers print, passed on."""

import os
import threading

import pytest

from grpo.processes.output import Output


def test_all_that_was_printed_is_said_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    """However late its thread gets to read it."""
    output, far = Output("mine"), threading.Event()
    said = output._say
    output._say = lambda line: (far.wait(0.2), said(line))
    os.write(output.descriptor, b"hello\n" * 3)
    output.close()
    assert capsys.readouterr().err == "[mine] hello\n[mine] (the same 2 times more)\n"


def test_a_process_that_holds_the_pipe_does_not_hold_the_end() -> None:
    output = Output("mine")
    held = os.dup(output.descriptor)
    output.close(0.05)
    assert output._thread.is_alive()
    os.close(held)
    output._thread.join(10)
    assert not output._thread.is_alive()
