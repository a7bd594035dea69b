"""How long a process that gave no proper answer is waited for before it is killed."""

import pytest

from grpo.processes.endings import ended
from grpo.processes.output import Output


class Process:
    """A child process that goes on, and keeps how long it was given."""

    seconds = -1.0

    def end(self, seconds: float) -> tuple[None, bool]:
        self.seconds = seconds
        return None, False


@pytest.mark.parametrize(("error", "waits"), [(EOFError(), True), (ConnectionError(), True), (KeyError("id"), False)])
def test_only_a_process_that_has_hung_up_is_given_time_to_end(error: Exception, waits: bool) -> None:
    process = Process()
    out_of_memory, said = ended(process, Output.__new__(Output), error, "in a call", None)
    assert (process.seconds > 0) == waits
    assert not out_of_memory
    assert said.startswith("its process sent an invalid message in a call")
