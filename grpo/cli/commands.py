"""Changes to how Typer lists commands and parses their options."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from grpo.config import Recipe
from grpo.errors import UserError


class CommandGroup(TyperGroup):
    """Lists its commands, each with its whole first sentence, on as many lines as necessary."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        listed = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(limit=1_000)) for name, command in listed if not command.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class TakesSettings(TyperCommand):
    """A command with `key.sub=value` arguments, whose error explains this to users who write `--key.sub value`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)  # the parser removes arguments from `args`
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if (option := getattr(error, "option_name", None)) and (setting := _as_setting(option, given)):
                raise UserError(f"{option}: settings of a recipe are written without dashes: {setting}") from None
            raise


def _as_setting(option: str, args: list[str]) -> str | None:
    """Return `optim.steps=10` for `--optim.steps 10` or `--optim.steps=10` in `args`; None if it is not a setting."""
    key = option.lstrip("-")
    if key.replace("-", "_") in Recipe.model_fields:
        key = key.replace("-", "_")
    elif key.partition(".")[0] not in Recipe.model_fields:
        return None
    place = next(n for n, argument in enumerate(args) if argument.partition("=")[0] == option)
    _, equals, value = args[place].partition("=")
    return f"{key}={value if equals else ''.join(args[place + 1 : place + 2]) or '...'}"
