"""A row becomes a task: its prompt as rewards see it, and as token ids."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo.backend.hub import one_line
from grpo.config import DataConfig
from grpo.errors import UserError
from grpo.types import Message, Prompt, Task

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class PromptRenderer:
    """Makes tasks from rows as a recipe's `data` section says."""

    def __init__(self, cfg: DataConfig, tokenizer: TokenizerWrapper) -> None:
        self.cfg = cfg
        self.tokenizer = tokenizer

    @property
    def columns(self) -> list[str]:
        """The columns that prompts are made of."""
        return _columns_of(self.cfg.prompt) if "{" in self.cfg.prompt else [self.cfg.prompt]

    def task(self, index: int, row: Mapping[str, Any]) -> Task | None:
        """The task of a row, or None for a row whose prompt is null.

        Raises UserError for a column that is not there, a prompt that is neither text nor messages, messages
        without a chat template, and a prompt that comes to no tokens.
        """
        prompt = self._prompt(index, row)
        if prompt is None:
            return None
        ids = tuple(self._encode(prompt))
        if not ids:
            raise UserError(
                f"data.prompt: row {index} of {self.cfg.source} comes to no tokens; has the model a tokenizer?"
            )
        return Task(index, prompt, ids, row)

    def _prompt(self, index: int, row: Mapping[str, Any]) -> Prompt | None:
        setting = self.cfg.prompt
        if "{" in setting:
            values = {name: _written(self._column(row, name)) for name in self.columns}
            if odd := [name for name, value in values.items() if isinstance(value, list | dict)]:
                raise UserError(f"data.prompt: column {odd[0]!r} is no text for a template, but {values[odd[0]]!r:.80}")
            return None if None in values.values() else setting.format_map(values)
        value = self._column(row, setting)
        if value is None or isinstance(value, str) or _is_messages(value):
            return value  # type: ignore[no-any-return]
        raise UserError(
            f"data.prompt: column {setting!r} of row {index} in {self.cfg.source} is neither text nor a list of "
            f"messages with role and content: {str(value)[:80]!r}"
        )

    def _column(self, row: Mapping[str, Any], name: str) -> Any:
        if name not in row:
            raise UserError(f"data.prompt: no column {name!r} in {self.cfg.source}; there is {', '.join(row)}")
        return row[name]

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) and not self._wraps_text():
            if self.cfg.chat_template_kwargs:
                raise UserError("data.chat_template_kwargs does nothing: text goes to this model without a template")
            return list(self.tokenizer.encode(prompt))
        if not self.tokenizer.has_chat_template:
            raise UserError(
                f"data.prompt: prompts from {self.cfg.source} need a chat template and the model has none; use an "
                "instruct model, or text prompts with chat_template: never"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.cfg.system is not None and isinstance(prompt, str):
            messages = [{"role": "system", "content": self.cfg.system}, *messages]
        kwargs = self.cfg.chat_template_kwargs
        try:
            return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **kwargs))
        except Exception as error:  # the template is the model's own code
            raise UserError(f"data.prompt: the model's chat template refuses: {one_line(error)}") from error

    def _wraps_text(self) -> bool:
        if self.cfg.chat_template == "auto" and self.cfg.system is None:
            return bool(self.tokenizer.has_chat_template)
        return self.cfg.chat_template != "never"


def _written(value: Any) -> Any:
    """A list of numbers as people write one; anything else as it is."""
    numbers = isinstance(value, list) and value and all(isinstance(number, int | float) for number in value)
    return ", ".join(map(str, value)) if numbers else value


def _columns_of(template: str) -> list[str]:
    try:
        fields = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"data.prompt: {template!r} is not a template: {error}; write {{{{ for a brace") from None
    for name, spec, conversion in fields:
        if not name.isidentifier() or spec or conversion:
            raise UserError(
                f"data.prompt: a template holds names of columns, {{like_this}}; {{{{ is a brace: {template!r}"
            )
    return [name for name, _, _ in fields]


def _is_messages(value: Any) -> bool:
    def is_message(item: Any) -> bool:
        return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)

    return isinstance(value, list) and len(value) > 0 and all(map(is_message, value))


def last_text(prompt: str | list[Message]) -> str:
    """A prompt as one text, for people."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
