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
    assert capsys.readouterr().err == "[mine] hello\n[mine] (2 more lines, the same as above)\n"


def test_a_process_that_holds_the_pipe_does_not_hold_the_end() -> None:
    output = Output("mine")
    held = os.dup(output.descriptor)
    output.close(0.05)
    assert output._thread.is_alive()
    os.close(held)
    output._thread.join(10)
    assert not output._thread.is_alive()


def test_lines_that_alternate_are_said_once_in_each_scoring(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output("mine")
    for lines in ([b"a", b"b", b"a"], [b"a", b"b", b"a", b"b", b"c"]):
        output.begin()
        for line in lines:
            output._say(line)
    output.close()
    first = "[mine] a\n[mine] b\n[mine] (1 more line, the same as above)\n"
    second = "[mine] a\n[mine] b\n[mine] c\n[mine] (2 more lines, the same as above)\n"
    assert capsys.readouterr().err == first + second
