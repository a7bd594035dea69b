"""What the code of an environment or a tool returned or raised, as a reply that can be sent and stored."""

from __future__ import annotations

import json
import math
import traceback
from pathlib import Path
from typing import Any

from grpo.environments.seats import Reply
from grpo.errors import UserError

LONGEST = 1_000_000
"""Characters of a result. A longer one is an error: no model reads it, and it would be stored with every completion."""
LONGEST_MESSAGE = 10_000
"""Characters of an exception's message."""
LARGEST = 1e15
"""The largest reward: beyond it a group's deviation would overflow float32."""


NUMBERS = "Give a number between -1e15 and 1e15, or None for none"
"""What to do about a reward or a metric that is no number."""


class WrongResultError(Exception):
    """What was returned is not what the contract says."""


def of_reset(value: Any) -> Reply:
    """None, text or content blocks, to be added to the prompt."""
    if value is None or isinstance(value, str):
        return Reply(value=value if value is None else _text(value))
    if not _is_blocks(value):
        raise WrongResultError(f"reset returned {shortened(value)}: return None, text, or a list of content blocks")
    return Reply(value=_plain(value))


def of_tool(value: Any) -> Reply:
    """Content blocks as they are, anything else as text; alone, or in a `Step`."""
    if not is_step(value):
        return Reply(value=_plain(value) if _is_blocks(value) else _text(value))
    result = value.result
    content = None if result is None else _plain(result) if _is_blocks(result) else _text(result)
    return Reply(value=content, reward=number_of(value.reward, "the reward of a Step"), done=bool(value.done))


def of_step(value: Any) -> Reply:
    """None, or messages: a text or content blocks are a user's message; alone, or in a `Step`."""
    if is_step(value):
        reward = number_of(value.reward, "the reward of a Step")
        return Reply(value=_messages(value.result), reward=reward, done=bool(value.done))
    return Reply(value=_messages(value))


def of_reward(value: Any) -> Reply:
    """A number, or None: it does not apply."""
    return Reply(value=number_of(value, "get_reward"))


def of_exception(error: BaseException, tool: bool, file: str | None = None) -> Reply:
    """What was raised. The model is shown a tool's message alone; people also see where it was raised: the last place
    in `file`, if the error came through that, or else where it began."""
    try:
        said = str(error)[:LONGEST_MESSAGE]
    except Exception:  # an exception whose own code fails
        said = "<exception str() failed>"
    if tool or isinstance(error, WrongResultError | UserError):
        return Reply("error", error=_encodable(said or type(error).__name__))
    frames = traceback.extract_tb(error.__traceback__)
    frames = traceback.StackSummary.from_list([one for one in frames if one.filename == file]) or frames
    ours = not frames or Path(frames[-1].filename).parent == Path(__file__).parent  # their code was not even entered
    where = "" if ours else f" ({frames[-1].filename}:{frames[-1].lineno})"
    return Reply("error", error=_encodable(f"{type(error).__name__}: {said}{where}"))


def is_step(value: Any) -> bool:
    """Whether it has what a `grpo.Step` has, whatever its class."""
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
    """Blocks or messages as JSON holds them. Raises WrongResultError for what JSON does not hold."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise WrongResultError(f"it returned content that JSON does not hold: {error}") from None
    plain: list[dict[str, Any]] = json.loads(_encodable(_measured(text)))
    return plain


def _text(value: Any) -> str:
    return _encodable(_measured(str(value)))


def _measured(text: str) -> str:
    if len(text) > LONGEST:
        raise WrongResultError(
            f"the result is too long: {len(text):,} characters, and at most {LONGEST:,} are possible"
        )
    return text


def _encodable(text: str) -> str:
    """The text without lone surrogates, which no tokenizer takes."""
    return text.encode(errors="replace").decode()


def number_of(value: Any, what: str) -> float | None:
    """A finite number, or None for None. Raises WrongResultError for everything else: `what` is not usable."""
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # an object of other people's
        number = math.nan
    if not abs(number) <= LARGEST:  # NaN too
        raise WrongResultError(f"{what} is not a usable number: {shortened(value)}. {NUMBERS}")
    return number


def shortened(value: Any) -> str:
    """A value of other people's as an error shows it."""
    try:
        return repr(value)[:80]
    except Exception:  # an object of other people's
        return f"a {type(value).__name__}"
