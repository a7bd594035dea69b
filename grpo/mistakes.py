"""Explains why the schema refuses a recipe: file, line, key, the given value, the expected value.

Pydantic's errors name a path of keys; this module turns them into readable lines.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Annotated, Any, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from grpo.config import Recipe
from grpo.config.optim import OPTIMIZER_ARGS
from grpo.document import Keys
from grpo.errors import closest
from grpo.trl import Translation, answer

MOST_SAID = 20
"""Maximum number of mistakes that are explained together; further mistakes are only counted."""
LONGEST_SHOWN = 200
"""Maximum number of characters of a value or a key in a message."""


def explanations(error: ValidationError, data: Any, locate: Callable[[Keys], str], within: Keys = ()) -> list[str]:
    """One line per mistake in `data`; `locate` gives the place of a path of keys.

    `data` is a recipe, or its section at `within`. A missing key is not reported if it was misspelled.
    """
    errors = error.errors()
    for key in reversed(within):
        data = {key: data}
    for detail in errors:
        detail["loc"] = (*within, *detail["loc"])
    details = _one_per_place(errors, data)
    unknown = [keys for keys, detail in details.items() if detail["type"] == "extra_forbidden"]
    misspelt = {_meant(keys) for keys in unknown[:MOST_SAID]}
    said = [
        (keys, detail)
        for keys, detail in details.items()
        if detail["type"] != "missing" or dotted(named(keys)) not in misspelt
    ]
    lines = [_explain(keys, detail, locate(_subject(keys, detail, locate))) for keys, detail in said[:MOST_SAID]]
    return [*lines, f"and {len(said) - MOST_SAID:,} more mistakes"] if len(said) > MOST_SAID else lines


def _one_per_place(errors: Iterable[ErrorDetails], data: Any) -> dict[Keys, ErrorDetails]:
    """The innermost errors, one per path of keys: a union reports one error per member, and a list one more."""
    by_place: dict[Keys, list[ErrorDetails]] = {}
    for detail in errors:
        by_place.setdefault(_keys(detail, data), []).append(detail)
    inner = {keys[:depth] for keys in by_place for depth in range(len(keys))}
    return {keys: _merged(details) for keys, details in by_place.items() if keys not in inner or keys == ()}


def _merged(details: Sequence[ErrorDetails]) -> ErrorDetails:
    """One error for a value that every member of a union refuses: all expected types, or that a list is too short."""
    short = next((detail for detail in details if detail["type"] == "too_short"), None)
    wanted = list(dict.fromkeys(_wanted(detail["msg"].removeprefix("Input should be ")) for detail in details))
    if short is not None or len(wanted) == 1:
        return short or details[0]
    return {**details[0], "msg": f"Input should be {', '.join(wanted[:-1])} or {wanted[-1]}"}


def _wanted(expected: str) -> str:
    """The type that one member of a union expects, in words that fit into a list of types."""
    if expected == "a valid boolean":
        return "true, false"
    return f"a number {expected}" if expected.startswith(("greater ", "less ")) else expected


def _keys(detail: ErrorDetails, data: Any) -> Keys:
    """The path of keys in the data, without the names that pydantic adds for the members of a union."""
    path: Keys = ()
    for part in detail["loc"]:
        there = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if there:
            data = data[part]
        elif detail["type"] != "missing" or part != detail["loc"][-1]:
            continue
        path = (*path, part)
    return path


def _subject(keys: Keys, detail: ErrorDetails, locate: Callable[[Keys], str]) -> Keys:
    """The path of keys that a mistake is about: where pydantic found it, or the first key in a message of the schema
    that is written in the recipe."""
    if detail["type"] != "value_error":
        return keys
    named_there = [
        tuple(int(part) if part.isdecimal() else part for part in found.split("."))
        for found in re.findall(r"[a-z_]+(?:\.[a-z0-9_]+)+", detail["msg"])
    ]
    first = re.match(r"(?:Value error, )?([a-z_]+)", detail["msg"])
    if not keys and first is not None and first[1] in Recipe.model_fields:  # "rewards: a run needs at least one"
        named_there.append((first[1],))
    return next((subject for subject in named_there if locate(subject) != locate(())), keys)


def _explain(path: Keys, detail: ErrorDetails, place: str) -> str:
    key = shortened(dotted(path))
    match detail["type"]:
        case "extra_forbidden":
            return f"{place}: unknown key {key}.{_hint(path)}"
        case "missing":
            return f"{place}: {key} is missing. {_help(path)}".rstrip()
        case "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            names_itself = not path or message.startswith(f"{path[0]}.")
            return f"{place}: {message}" if names_itself else f"{place}: {key}: {message}"
    given = shortened(json.dumps(detail["input"], default=str, ensure_ascii=False))
    match detail["type"]:
        case "too_short":
            return f"{place}: {key}: expected at least one, got {given}.{_example(path)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{place}: {key}: expected keys and values, got {given}.{_example(path)}"
    expected = detail["msg"].replace("Input should be", "expected", 1).replace("a valid array", "a list")
    place, _, _ = place.partition(f": {key}=")  # an override's place repeats the key and the value
    return f"{place}: {key}: {expected}, got {given}.{_remedy(path, detail, expected)}"


def _words(line: str) -> list[str]:
    """The words of a command line, split like in a shell."""
    try:
        return shlex.split(line)
    except ValueError:  # an unclosed quote
        return line.split()


def _remedy(path: Keys, detail: ErrorDetails, expected: str) -> str:
    """A sentence on what to write instead of a value of the wrong type; empty if that is unknown."""
    value = detail["input"]
    if path[-1:] == ("optimizer",) and isinstance(value, str) and re.search("_?8bit", value):
        return " For 8-bit moments, set optim.moments: int8, which works with each of these."
    if detail["type"] == "literal_error" and (close := _similar(value, re.findall(r"'([^']*)'", expected))):
        return f" Did you mean {close!r}?"
    if isinstance(value, str) and "a list" in expected:
        if path[-1:] == ("command",):
            return f" Write {dotted(path)}: {json.dumps(_words(value))}"
        item = f"{{use: {shortened(value)}}}" if path == ("rewards",) else json.dumps(shortened(value))
        return f" Write {dotted(path)}: [{item}]"
    if isinstance(value, dict) and path == ("rewards",):
        return " Write a dash before each reward, or rewards: [{use: …}]"
    among = re.search(r"\b(number|integer)\b", expected) or value in re.findall(r"[\d']+", expected)
    if isinstance(value, str) and among and _is_number(value):
        return " Write it without quotes."
    if isinstance(value, float) and value.is_integer() and "integer" in expected:
        written = f"Write {int(value)}." if abs(value) < 1e15 else ""
        return f" {_outside(path, int(value)) or written}".rstrip()
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _outside(path: Keys, value: int) -> str | None:
    """The schema's error, as a sentence, for an integer outside a setting's bounds; None for an integer inside."""
    field = _field(path)
    form: Any = Annotated[field.annotation, field]
    try:
        TypeAdapter(form).validate_python(value)
    except ValidationError as error:
        bounds = [detail["msg"] for detail in error.errors() if detail["type"].startswith(("less_", "greater_"))]
        return f"{bounds[0].replace('Input should be', 'It should be')}." if bounds else None
    return None


def _similar(value: Any, known: Sequence[str]) -> str | None:
    """The known word that a text probably means."""
    if not isinstance(value, str) or len(value) > LONGEST_SHOWN:
        return None
    return closest(value.lower(), known)


FORMS = {
    "model": "{name: Qwen/Qwen3-0.6B}",
    "data": "{source: questions.jsonl}",
    "environment": '{use: "game.py:Game"}',
    "environments": '{game: {use: "game.py:Game"}}',
    "tools": "[calculator]",
    "rewards": "{use: math_answer}",
    "optim": "{steps: 500}",
    "memory": "{limit_gb: 16}",
    "log.wandb": "{project: grpo}",
    "data.sources": "{source: questions.jsonl}",
    "data.curriculum": "{} for the defaults",
    "teacher": "{model: NAME} or {adapter: FOLDER}",
}
"""Examples of sections whose form may be unclear from the names of their keys."""


def _example(path: Keys) -> str:
    form = FORMS.get(section := dotted(named(path)))
    if form is None:
        return ""
    return f" Write {section}: [{form}]" if path == ("rewards",) else f" Write {form}"


def _hint(path: Keys) -> str:
    name = str(path[-1])
    if path == ("rollout", "environment"):
        return ' It is now environment.use: write environment: {use: "file.py:Class"}, a section next to rollout.'
    if not _named_so(name) and (found := _answer(path)):
        return f" {found[1].sentence(found[0])}"
    if _is_optimizers(path):
        return f" Did you mean {OWN_ARGS}.{name}? Arguments of the optimizer belong in {OWN_ARGS}."
    if meant := _meant(path):
        section, _, key = meant.rpartition(".")
        here = section == dotted(named(path[:-1]))
        return f" Did you mean {dotted((*path[:-1], key)) if here else meant}?"
    beside = _keys_beside(path)
    return f" Valid here: {', '.join(key.rpartition('.')[2] for key in beside)}." if beside else ""


def _meant(path: Keys) -> str | None:
    """The valid key that an unknown key probably means: a key of the same name, the translation of TRL's name, a
    similar key in the same section, or else a similar key anywhere."""
    name = str(path[-1])
    if exact := _named_so(name):
        return exact[0]
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    if found := _answer(path):
        keys = found[1].keys
        return keys[0] if keys else None
    if len(name) > LONGEST_SHOWN or name in OPTIMIZER_ARGS:  # momentum is not a typo for moments
        return None
    for candidates, similarity in ((_keys_beside(path), 0.6), (list(_all_keys(Recipe)), 0.8)):
        by_name = {key.rpartition(".")[2]: key for key in candidates}
        if close := closest(name, by_name, similarity):
            return by_name[close]
    return None


ELSEWHERE = {"lr": "optim.learning_rate", "max_new_tokens": "rollout.max_completion_length"}
"""Names that are common in other programs, and grpo's keys for them."""
OWN_ARGS = "optim.optimizer_args"


def _is_optimizers(path: Keys) -> bool:
    """Whether an unknown key is an optimizer's argument, written directly into `optim` or at the top level."""
    return path[-1] in OPTIMIZER_ARGS and path[:-1] in ((), ("optim",))


def _answer(path: Keys) -> tuple[str, Translation] | None:
    """The TRL or PEFT name of an unknown key, and its translation. In `adapter`, `alpha` is PEFT's `lora_alpha`."""
    name = str(path[-1])
    names = (name, f"lora_{name}") if path[0] == "adapter" else (name,)
    return next(((candidate, found) for candidate in names if (found := answer(candidate))), None)


def _named_so(name: str) -> list[str]:
    """The valid keys that end in a name."""
    return [key for key in _all_keys(Recipe) if key.rpartition(".")[2] == name]


def _keys_beside(path: Keys) -> list[str]:
    section = dotted(named(path[:-1]))
    return [key for key in _all_keys(Recipe) if key.rpartition(".")[0] == section]


def named(path: Keys) -> Keys:
    """The path in the schema: without indices of lists, and without the names of `environments`."""
    parts = tuple(part for part in path if isinstance(part, str))
    return (parts[0], *parts[2:]) if parts and parts[0] in sections_by_name() else parts


@cache
def sections_by_name() -> frozenset[str]:
    """The keys of a recipe whose sections have names that the user chooses."""
    fields = Recipe.model_fields.items()
    return frozenset(name for name, field in fields if get_origin(field.annotation) is dict)


def _help(path: Keys) -> str:
    """The schema's description of a key."""
    return (_field(path).description or "").replace("\n", " ")


def _field(path: Keys) -> FieldInfo:
    """The schema's field for a valid key."""
    *above, name = named(path)
    section: Any = Recipe
    for part in above:
        section = section_of(section.model_fields[part].annotation)
    field: FieldInfo = section.model_fields[name]
    return field


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if inner := section_of(field.annotation):
            yield from _all_keys(inner, f"{prefix}{name}.")


def keys_of(section: type[BaseModel]) -> Keys:
    """The key of this section in a recipe; no keys for the recipe itself."""
    found = (name for name, field in Recipe.model_fields.items() if section_of(field.annotation) is section)
    return tuple(name for name in [next(found, None)] if name is not None)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section in `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, getattr(annotation, "__args__", ()))), None)


def dotted(path: Keys) -> str:
    return ".".join(map(str, path))


def shortened(text: str) -> str:
    """A text of the user's, truncated for a message."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."
