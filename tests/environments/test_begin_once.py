"""A conversation that is begun for a trial: as the first of its row is, and given back."""

from __future__ import annotations

import pytest
from environments.conversing import Host, Numbers

from grpo.backend.random import derive_seed
from grpo.environments.conversations import Conversations
from grpo.environments.play import Table
from grpo.environments.seats import Reply
from grpo.errors import UserError
from grpo.types import Task

TASK = Task(4, [{"role": "user", "content": "20"}], (11, 20), {"answer": "42", "environment": "fake"})


def begun(name: str, host: Host, chat: Numbers | None = None):
    return Conversations({name: Table(host, chat or Numbers())}, 7, 99).begin_once(TASK)


@pytest.mark.parametrize("name", ["", "fake"])
def test_it_begins_as_the_first_of_its_row_does(name: str) -> None:
    host = Host(reset=lambda *_: " 21")
    assert begun(name, host) == " 21"
    (seat,) = host.all
    columns = {"prompt": TASK.prompt, **TASK.columns}
    shown = {key: value for key, value in columns.items() if not name or key != "environment"}
    assert seat.asked == [("reset", shown, derive_seed(7, "environment:data", 4, 0))]
    assert seat.released == 1


def test_a_reset_that_fails_is_given_back_too() -> None:
    host = Host(reset=lambda *_: Reply("timeout", error="no answer in 60 s"))
    with pytest.raises(UserError, match="no answer in 60 s"):
        begun("", host)
    assert host.all[0].released == 1


def test_what_the_chat_template_refuses_is_found() -> None:
    chat = Numbers()

    def refuse(_):
        raise UserError("blocks are not text")

    chat.prompt_ids = refuse
    assert begun("", Host(reset=lambda *_: None), chat) is None
    with pytest.raises(UserError, match="blocks are not text"):
        begun("", Host(reset=lambda *_: [{"type": "image"}]), chat)
