"""Turns rows into tasks: the prompt as rewards see it, and its token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from grpo.backend.hub import one_line
from grpo.config import DataConfig
from grpo.data.messages import check_messages, text_of, with_system
from grpo.data.rendering import Schema, rendered_ids
from grpo.data.rows import is_null
from grpo.data.templates import columns_of, filled
from grpo.errors import UserError
from grpo.types import Message, Prompt, Task

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper

Tools = Sequence[Schema] | Mapping[str, Sequence[Schema]]
"""The tools that a prompt shows. With several environments, each environment's tools by its name (column
`environment`)."""


class PromptReader:
    """Reads prompts from rows, as a recipe's `data` section says: text or messages, without token ids."""

    supplied = chats = False

    def __init__(self, cfg: DataConfig, source: str = "data") -> None:
        """`source` is the source name in the tasks."""
        self.cfg = cfg
        self.source = source

    @property
    def columns(self) -> list[str]:
        """The columns that prompts are built from."""
        return columns_of(self.cfg.prompt) if "{" in self.cfg.prompt else [self.cfg.prompt]

    def fits(self, task: Task) -> bool:  # noqa: ARG002  the length needs a tokenizer
        """True, because the prompt's length is unknown without a tokenizer."""
        return True

    def task(self, index: int, row: Mapping[str, Any]) -> Task | None:
        """The task of a row, without token ids, or None for a row whose prompt is null.

        Raises UserError for a missing column, for a prompt that is neither text nor messages, and for messages that end
        with the answer.
        """
        prompt = self._prompt(index, row)
        if isinstance(prompt, str) and self.chats and self.cfg.system is not None:
            prompt = with_system([{"role": "user", "content": prompt}], self.cfg.system, self._row(index))
        return None if prompt is None else Task(index, prompt, (), row, self.source)

    def _prompt(self, index: int, row: Mapping[str, Any]) -> Prompt | None:
        setting = self.cfg.prompt
        if "{" in setting:
            return filled(setting, {name: self._column(index, row, name) for name in self.columns}, self._row(index))
        empty = self.supplied and setting == "prompt" and setting not in row
        value = [{"role": "user", "content": ""}] if empty else self._column(index, row, setting)
        if is_null(value):
            return None
        if isinstance(value, str):
            if self.cfg.continue_final_message:
                raise UserError(
                    f"data.continue_final_message does nothing: the prompt in {self._row(index)} is text, not messages"
                )
            return value
        messages = check_messages(value, f"column {setting!r} of {self._row(index)}", self.cfg.continue_final_message)
        return messages if self.cfg.system is None else with_system(messages, self.cfg.system, self._row(index))

    def _row(self, index: int) -> str:
        return f"row {index} of {self.cfg.label}"

    def _column(self, index: int, row: Mapping[str, Any], name: str) -> Any:
        if name not in row:
            raise UserError(f"data.prompt: no column {name!r} in {self._row(index)}; it has {', '.join(row)}")
        return row[name]


class PromptRenderer(PromptReader):
    """Makes tasks from rows as a recipe's `data` section says."""

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: TokenizerWrapper,
        vocabulary: int | None = None,
        source: str = "data",
        tools: Tools = (),
        supplied: bool = False,
        chats: bool = False,
    ) -> None:
        """`vocabulary` is the size of the model's vocabulary; if given, prompts are checked for unknown tokens.
        `source` is the source name in the tasks. `tools` are shown to the model in the prompt. `supplied` means that
        environments add to prompts, so a row without the column `prompt` has an empty user message. `chats` means that
        with a system message a text prompt becomes messages, for rewards and environments too."""
        super().__init__(cfg, source)
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.tools = tools
        self.supplied, self.chats = supplied, chats

    @property
    def identity(self) -> str | None:
        """A hash of the tokenizer and its chat template, or None if they cannot be identified."""
        import transformers

        whole, template = getattr(self.tokenizer, "backend_tokenizer", None), self.tokenizer.chat_template
        if whole is None or not isinstance(template, str | dict | None):
            return None
        code = getattr(self.tokenizer, "_chat_template", None)  # mlx-lm's code for models without a template
        described = (whole.to_str(), template, getattr(code, "__module__", None), transformers.__version__)
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def fits(self, task: Task) -> bool:
        """Whether the prompt is no longer than `max_prompt_length`."""
        return len(task.prompt_ids) <= self.cfg.max_prompt_length

    def task(self, index: int, row: Mapping[str, Any]) -> Task | None:
        """The task of a row with its token ids, or None for a row whose prompt is null.

        Raises UserError as `PromptReader` does, and as `encoded` does.
        """
        task = super().task(index, row)
        return None if task is None else self.encoded(task)

    def encoded(self, task: Task) -> Task:
        """The task with token ids.

        Raises UserError for messages without a chat template, for a prompt without tokens, and for a token that has no
        embedding in the model (MLX would read memory beyond the last embedding).
        """
        index, ids = task.index, tuple(self._encode(task.index, task.prompt, self._tools_of(task)))
        if not ids:
            raise UserError(f"data.prompt: {self._row(index)} has no tokens; check the model's tokenizer")
        if self.vocabulary is not None and (highest := max(ids)) >= self.vocabulary:
            raise UserError(
                f"data.prompt: {self._row(index)} has a token {highest}, but the model's vocabulary has only "
                f"{self.vocabulary} tokens: the tokenizer belongs to another model, or tokens were added to it alone"
            )
        return replace(task, prompt_ids=ids)

    @property
    def wraps_text(self) -> bool:
        """Whether a text prompt is wrapped in the chat template, as a user message."""
        if self.cfg.chat_template == "auto" and self.cfg.system is None:
            return bool(self.tokenizer.has_chat_template)
        return self.cfg.chat_template != "never"

    def _tools_of(self, task: Task) -> Sequence[Schema]:
        if isinstance(self.tools, Mapping):
            return self.tools.get(task.columns.get("environment", ""), ())
        return self.tools

    def _encode(self, index: int, prompt: Prompt, tools: Sequence[Schema]) -> list[int]:
        if isinstance(prompt, str) and not self.wraps_text:
            if self.cfg.chat_template_kwargs:
                raise UserError(
                    "data.chat_template_kwargs does nothing: text prompts of this model do not use the chat template"
                )
            return list(self.tokenizer.encode(prompt))
        if not isinstance(prompt, str) and self.cfg.chat_template == "never":
            raise UserError(
                f"data.chat_template: never, but the prompt in {self._row(index)} is chat messages, which need the "
                "chat template; remove the setting, or name a column with text"
            )
        if not self.tokenizer.has_chat_template:
            raise UserError(
                f"data.prompt: prompts from {self.cfg.label} need a chat template, but the model has none; use an "
                "instruct model, or text prompts with chat_template: never"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.cfg.system is not None and isinstance(prompt, str):
            messages = with_system(messages, self.cfg.system, self._row(index))
        try:
            return rendered_ids(self.tokenizer, messages, tools, self.cfg.chat_template_kwargs)
        except Exception as error:  # the template is the model's code
            raise UserError(
                f"data.prompt: the model's chat template rejects {self._row(index)}: {one_line(error)}"
            ) from error


def last_text(prompt: str | list[Message]) -> str:
    """A prompt as a single text, for display: the last message that is not the assistant's."""
    if isinstance(prompt, str):
        return prompt
    questions = [message for message in prompt if message["role"] != "assistant"]
    return text_of(questions[-1] if questions else prompt[-1])
