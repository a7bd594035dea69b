"""The manual's reference, made from the code: settings, commands, metrics, the Python API."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import typer

import grpo
from grpo.cli import app
from grpo.config.describe import RecipeKey, settings
from grpo.scoring.meanings import MEANINGS

WIDTH = 96
LINE = 84
TRAINED_BY = ("load", "tasks", "score", "reward", "advantages", "batches", "Loss", "optimizer")
"""The Python names of a loop of one's own, in the order of a step."""
RETURNED = ("grpo.door.policy.LoadedPolicy", "grpo.door.optimizers.PolicyOptimizer", "grpo.door.trainer.Ending")
"""Classes that nobody makes by their names: the functions of the API return them."""
RUN_BY = ("recipe", "Trainer", "STOP")


@cache
def pages() -> dict[str, str]:
    """Every page of the reference, by its place in the manual."""
    return {
        "reference/settings.md": settings_page(),
        "reference/commands.md": commands_page(),
        "reference/metrics.md": metrics_page(),
        "reference/python.md": python_page(),
        "contributing/rooms.md": rooms_page(),
    }


def settings_page() -> str:
    """A heading for each setting, so that each has an anchor and is found by the search."""
    lines = [
        "# Recipe settings",
        "",
        "Every setting of a recipe: its type and bounds, its default, and what it does. `grpo recipes schema [KEY]` "
        "prints the same; `grpo recipes schema --json` writes a JSON Schema for editors. On the command line, "
        "`grpo train RECIPE key.sub=value` replaces a setting; `rewards.0.weight=2` reaches into a list.",
        "",
    ]
    keys = settings()
    sections = [key.key for key in keys if "." not in key.key and any(k.key.startswith(f"{key.key}.") for k in keys)]
    lines += ["## General {#section-general}", ""]
    for key in keys:
        if key.key not in sections and "." not in key.key:
            lines += setting_lines(key)
    for section in sections:
        lines += [f"## {section} {{#section-{section}}}", ""]
        for key in keys:
            if key.key.partition(".")[0] == section:
                lines += setting_lines(key)
    return "\n".join(lines) + "\n"


def setting_lines(setting: RecipeKey) -> list[str]:
    default = "required" if setting.default is None else f"default `{setting.default}`"
    return [
        f"#### `{setting.key}` {{#{anchor(setting.key)}}}",
        "",
        f"*{escaped(setting.type)}*, {default}",
        "",
        escaped(setting.meaning),
        "",
    ]


def commands_page() -> str:
    """`--help` of every command."""
    lines = ["# Commands", "", "What `--help` prints for each command.", ""]
    for name, text in commands():
        depth = "##" if name.count(" ") <= 1 else "###"
        lines += [f"{depth} `{name}` {{#{anchor(name)}}}", "", "```text", text.rstrip(), "```", ""]
    return "\n".join(lines) + "\n"


def commands() -> Iterator[tuple[str, str]]:
    """Every command's whole name with its help, groups before what they hold."""
    yield from _commands(typer.main.get_command(app), "grpo", None)


def _commands(command: Any, name: str, parent: Any) -> Iterator[tuple[str, str]]:
    if command.hidden:
        return
    settings = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    context = command.context_class(command, info_name=name.rpartition(" ")[2], parent=parent, **settings)
    yield name, click.unstyle(command.get_help(context))
    for sub, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{name} {sub}", context)


def metrics_page() -> str:
    lines = [
        "# Metrics",
        "",
        "`metrics.jsonl` has one line per training step and `eval.jsonl` one line per evaluation. Names are TRL's "
        "where TRL has the metric. W&B shows the metrics of a step under `train/`. Means over tokens are over the "
        "tokens that were trained on, except `entropy`, and `kl` without a penalty in the loss: these are over all "
        "tokens of the step's groups. A step that trained on no tokens has no other metrics of this kind.",
        "",
    ]
    for section, names in MEANINGS.items():
        lines += [f"## {section}", ""]
        for name, text in names.items():
            lines += [f"#### `{name}` {{#{anchor(name)}}}", "", escaped(text), ""]
    return "\n".join(lines) + "\n"


def python_page() -> str:
    """The public names of `import grpo`, with signatures and docstrings."""
    rest = [name for name in grpo.__all__ if name not in (*TRAINED_BY, *RUN_BY)]
    lines = ["# Python API", "", "`import grpo` has these names. MLX loads when a name is first used.", ""]
    for title, names in (("A loop of your own", TRAINED_BY), ("Whole runs", RUN_BY), ("Types and errors", rest)):
        lines += [f"## {title}", ""]
        for name in names:
            lines += described(f"grpo.{name}", getattr(grpo, name), "###")
    lines += ["## What these return", ""]
    for place in RETURNED:
        module, _, name = place.rpartition(".")
        lines += described(name, getattr(import_module(module), name), "###")
    return "\n".join(lines) + "\n"


def rooms_page() -> str:
    """What each room is, and which rooms it imports."""
    lines = [
        "# Rooms",
        "",
        "Every room of `grpo/` with the first sentence of its docstring and the rooms that its files import. "
        "[Architecture](architecture.md) has the order: imports only point upward.",
        "",
        "| room | what it is | imports |",
        "|---|---|---|",
    ]
    package = Path(grpo.__file__).parent
    for place in sorted(package.iterdir()):
        files = [*place.rglob("*.py")] if place.is_dir() else [place]
        room = place.name.removesuffix(".py")
        if place.name.startswith("_") or not files or (place.is_file() and place.suffix != ".py"):
            continue
        home = place / "__init__.py" if place.is_dir() else place
        first = (ast.get_docstring(ast.parse(home.read_text(encoding="utf-8"))) or "").split("\n")[0]
        others = sorted({name for file in files for name in imported(file)} - {room})
        lines.append(f"| `{room}` | {escaped(first)} | {', '.join(f'`{name}`' for name in others)} |")
    return "\n".join(lines) + "\n"


def imported(file: Path) -> Iterator[str]:
    """The rooms that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("grpo.") and "__" not in name)


def described(name: str, value: Any, depth: str) -> list[str]:
    """A name's signature and docstring; of a class its public methods, too."""
    lines = [f"{depth} `{name}` {{#{anchor(name)}}}", ""]
    if callable(value):
        lines += ["```python", f"{name.rpartition('.')[2]}{signature(value)}", "```", ""]
    if text := docstring(value):
        lines += [text, ""]
    if inspect.isclass(value) and not issubclass(value, Exception):
        for method, inner in members(value):
            lines += described(f"{name}.{method}", inner, "####")
    return lines


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """A class's own public methods and properties that have a docstring."""
    for name, value in vars(kind).items():
        inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not name.startswith("_") and (inspect.isfunction(inner) or isinstance(inner, property)) and inner.__doc__:
            yield name, inner


def signature(value: Any) -> str:
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    arguments = [one for one in found.parameters.values() if one.name != "self"]
    plain = [one.replace(annotation=Plain.of(one.annotation)) for one in arguments]
    returned = found.empty if inspect.isclass(value) else Plain.of(found.return_annotation)
    whole = found.replace(parameters=plain, return_annotation=returned)
    if len(str(whole)) <= LINE:
        return str(whole)
    names = [str(one) for one in plain]
    keyword_only = next((n for n, one in enumerate(plain) if one.kind is one.KEYWORD_ONLY), None)
    if keyword_only is not None and not any(one.kind is one.VAR_POSITIONAL for one in plain):
        names.insert(keyword_only, "*")
    result = str(whole.replace(parameters=[])).removeprefix("()")
    return "(\n" + "".join(f"    {name},\n" for name in names) + f"){result}"


class Plain(str):
    """An annotation that is written without quotes."""

    __slots__ = ()
    __repr__ = str.__str__

    @classmethod
    def of(cls, annotation: Any) -> Any:
        return cls(annotation) if isinstance(annotation, str) else annotation


def docstring(value: Any) -> str:
    """As Markdown: what is indented, and examples, are blocks of code."""
    text = inspect.getdoc(value) or ""
    if inspect.isclass(value) and text.startswith(f"{value.__name__}("):
        return ""  # a dataclass without a docstring has its signature in its place
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        if block.startswith(">>>"):
            block = f"```pycon\n{block}\n```"
        elif all(line.startswith(" ") for line in block.splitlines()):
            block = f"```text\n{inspect.cleandoc(block)}\n```"
        else:
            block = re.sub(
                r"(?m)^ +.*(\n +.*)*", lambda lines: f"\n```text\n{inspect.cleandoc(lines[0])}\n```\n", block
            )
        blocks.append(block)
    return "\n\n".join(blocks)


def anchor(name: str) -> str:
    """The id under which a setting, command, metric or Python name stands on its page."""
    return re.sub(r"[^\w.@/-]+", "-", name).strip("-")


def escaped(text: str) -> str:
    """Prose of the code as Markdown: nothing in it is HTML or a table's edge."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part.replace("|", "\\|") if part.startswith("`") else re.sub(r"([<|*_\[\]])", r"\\\1", part) for part in parts
    )
