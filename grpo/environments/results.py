"""Converts what the code of an environment or tool returned or raised to a reply that can be sent and stored."""

from __future__ import annotations

import json
import math
import traceback
from pathlib import Path
from typing import Any

from grpo.environments.seats import Reply
from grpo.errors import UserError

LONGEST = 1_000_000
"""Longest result, in characters. A longer result is an error: no model could read it, and every completion would store
it."""
LONGEST_MESSAGE = 10_000
"""Longest exception message, in characters."""
LARGEST = 1e15
"""The largest reward: beyond it, a group's standard deviation would overflow float32."""


NUMBERS = "Return a number between -1e15 and 1e15, or None if there is none"
"""What to do about a reward or metric that is not a usable number."""


class WrongResultError(Exception):
    """The returned value breaks the contract."""


def of_reset(value: Any) -> Reply:
    """Convert what `reset` returned: None, text, or content blocks to add to the prompt."""
    if value is None or isinstance(value, str):
        return Reply(value=value if value is None else _text(value))
    if not _is_blocks(value):
        raise WrongResultError(f"reset returned {shortened(value)}: return None, text, or a list of content blocks")
    return Reply(value=_plain(value))


def of_tool(value: Any) -> Reply:
    """Convert a tool's result, alone or in a `Step`: content blocks unchanged, anything else as text."""
    if not is_step(value):
        return Reply(value=_plain(value) if _is_blocks(value) else _text(value))
    result = value.result
    content = None if result is None else _plain(result) if _is_blocks(result) else _text(result)
    return Reply(value=content, reward=number_of(value.reward, "the reward of a Step"), done=bool(value.done))


def of_step(value: Any) -> Reply:
    """Convert what `step` returned, alone or in a `Step`, to messages or None. Text and blocks are a user's message."""
    if is_step(value):
        reward = number_of(value.reward, "the reward of a Step")
        return Reply(value=_messages(value.result), reward=reward, done=bool(value.done))
    return Reply(value=_messages(value))


def of_reward(value: Any) -> Reply:
    """Convert what `get_reward` returned: a number, or None if the reward does not apply."""
    return Reply(value=number_of(value, "get_reward"))


def of_exception(error: BaseException, tool: bool, file: str | None = None) -> Reply:
    """Convert an exception.

    With `tool`, the reply has only the message, for the model. Otherwise it has also the type and the place where the
    error was raised: the last frame in `file`, if the traceback has such a frame, or else the last frame.
    """
    try:
        said = str(error)[:LONGEST_MESSAGE]
    except Exception:  # an exception whose own code fails
        said = "<exception str() failed>"
    if tool or isinstance(error, WrongResultError | UserError):
        return Reply("error", error=_encodable(said or type(error).__name__))
    frames = traceback.extract_tb(error.__traceback__)
    frames = traceback.StackSummary.from_list([one for one in frames if one.filename == file]) or frames
    ours = not frames or Path(frames[-1].filename).parent == Path(__file__).parent  # user code was not even entered
    where = "" if ours else f" ({frames[-1].filename}:{frames[-1].lineno})"
    return Reply("error", error=_encodable(f"{type(error).__name__}: {said}{where}"))


def is_step(value: Any) -> bool:
    """Whether an object of any class has the attributes of a `grpo.Step`."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in ("result", "reward", "done"))


def _messages(value: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return [{"role": "user", "content": _text(value)}]
    if _is_message(value):
        value = [value]
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return _plain(value)
    if _is_blocks(value):
        return [{"role": "user", "content": _plain(value)}]
    raise WrongResultError(
        f"step returned {shortened(value)}: return text, a message, messages, None, or a Step of these"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _is_blocks(value: Any) -> bool:
    """Whether it is a list of content blocks, such as `[{"type": "text", "text": "…"}]`."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(block, dict) and isinstance(block.get("type"), str) for block in value)


def _plain(value: list[Any]) -> list[dict[str, Any]]:
    """Return blocks or messages after a round trip through JSON. Raises WrongResultError if JSON cannot hold them."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise WrongResultError(f"it returned content that JSON cannot represent: {error}") from None
    plain: list[dict[str, Any]] = json.loads(_encodable(_measured(text)))
    return plain


def _text(value: Any) -> str:
    return _encodable(_measured(str(value)))


def _measured(text: str) -> str:
    if len(text) > LONGEST:
        raise WrongResultError(f"the result is too long: {len(text):,} characters, but at most {LONGEST:,} are allowed")
    return text


def _encodable(text: str) -> str:
    """Return the text without lone surrogates, which tokenizers reject."""
    return text.encode(errors="replace").decode()


def number_of(value: Any, what: str) -> float | None:
    """Return the value as a finite float, or None for None. Raises WrongResultError, with `what`, for anything else."""
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # a user's object
        number = math.nan
    if not abs(number) <= LARGEST:  # NaN too
        raise WrongResultError(f"{what} is not a usable number: {shortened(value)}. {NUMBERS}")
    return number


def shortened(value: Any) -> str:
    """Return a short representation of a user's value for an error message."""
    try:
        return repr(value)[:80]
    except Exception:  # a user's object
        return f"a {type(value).__name__}"
