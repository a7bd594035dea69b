"""A row becomes a task: its prompt as rewards see it, and as token ids."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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

    def task(self, index: int, row: Mapping[str, Any]) -> Task:
        """The task of a row.

        Raises UserError for a column that is not there, a prompt that is neither text nor messages, and messages
        without a chat template.
        """
        prompt = self._prompt(index, row)
        return Task(index, prompt, tuple(self._encode(prompt)), row)

    def _prompt(self, index: int, row: Mapping[str, Any]) -> Prompt:
        setting = self.cfg.prompt
        if "{" in setting:
            return setting.format_map({name: self._column(row, name) for name in _columns_of(setting)})
        value = self._column(row, setting)
        if isinstance(value, str) or _is_messages(value):
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
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **kwargs))

    def _wraps_text(self) -> bool:
        if self.cfg.chat_template == "auto" and self.cfg.system is None:
            return bool(self.tokenizer.has_chat_template)
        return self.cfg.chat_template != "never"


def _columns_of(template: str) -> list[str]:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise UserError(f"data.prompt: {template!r} is not a template: {error}; write {{{{ for a brace") from None
    if odd := [field for field in fields if not field.isidentifier()]:
        raise UserError(f"data.prompt: {{{odd[0]}}} is not a column's name; write {{{{ for a brace")
    return fields


def _is_messages(value: Any) -> bool:
    def is_message(item: Any) -> bool:
        return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)

    return isinstance(value, list) and len(value) > 0 and all(map(is_message, value))


def last_text(prompt: str | list[Message]) -> str:
    """A prompt as one text, for people."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
