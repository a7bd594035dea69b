"""A row becomes a task: its prompt as rewards see it, and as token ids."""

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
"""The tools that a prompt shows; where there are several environments those of each, by the column `environment`."""


class PromptReader:
    """Reads prompts out of rows, as a recipe's `data` section says: text or messages, without their tokens."""

    supplied = chats = False

    def __init__(self, cfg: DataConfig, source: str = "data") -> None:
        """`source` is the name of the source that the tasks say they are of."""
        self.cfg = cfg
        self.source = source

    @property
    def columns(self) -> list[str]:
        """The columns that prompts are made of."""
        return columns_of(self.cfg.prompt) if "{" in self.cfg.prompt else [self.cfg.prompt]

    def fits(self, task: Task) -> bool:  # noqa: ARG002  how long a prompt is only a tokenizer knows
        """Whether the prompt is no longer than `max_prompt_length`, as far as that is known here."""
        return True

    def task(self, index: int, row: Mapping[str, Any]) -> Task | None:
        """The task of a row, without token ids, or None for a row whose prompt is null.

        Raises UserError for a column that is not there, a prompt that is neither text nor messages, and messages that
        end with the answer.
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
            raise UserError(f"data.prompt: no column {name!r} in {self._row(index)}; there is {', '.join(row)}")
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
        """`vocabulary` is how many tokens the model knows, where prompts are to be checked for others. `source` is the
        name of the source that the tasks say they are of. `tools` are shown to the model in the prompt. `supplied`:
        environments add to prompts, so a row without the column `prompt` has an empty message of the user.
        `chats`: with a system message a prompt of text is messages, for rewards and environments too."""
        super().__init__(cfg, source)
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.tools = tools
        self.supplied, self.chats = supplied, chats

    @property
    def identity(self) -> str | None:
        """A hash of what the tokenizer makes of text and messages, or None where that cannot be known."""
        import transformers

        whole, template = getattr(self.tokenizer, "backend_tokenizer", None), self.tokenizer.chat_template
        if whole is None or not isinstance(template, str | dict | None):
            return None
        code = getattr(self.tokenizer, "_chat_template", None)  # of mlx-lm's, for models without a template
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

        Raises UserError for messages without a chat template, a prompt that comes to no tokens, and a token that the
        model has no embedding of (MLX would read whatever lies behind the last one).
        """
        index, ids = task.index, tuple(self._encode(task.index, task.prompt, self._tools_of(task)))
        if not ids:
            raise UserError(f"data.prompt: {self._row(index)} comes to no tokens; has the model a tokenizer?")
        if self.vocabulary is not None and (highest := max(ids)) >= self.vocabulary:
            raise UserError(
                f"data.prompt: {self._row(index)} has token {highest}, and the model's vocabulary is of "
                f"{self.vocabulary}: its tokenizer is another model's, or has grown without it"
            )
        return replace(task, prompt_ids=ids)

    @property
    def wraps_text(self) -> bool:
        """Whether a prompt of text is put into the chat template, as a user's message."""
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
                raise UserError("data.chat_template_kwargs does nothing: text goes to this model without a template")
            return list(self.tokenizer.encode(prompt))
        if not isinstance(prompt, str) and self.cfg.chat_template == "never":
            raise UserError(
                f"data.chat_template: never, but the prompt in {self._row(index)} is chat messages, and only the "
                "chat template can put them together; leave the setting out, or name a column of text"
            )
        if not self.tokenizer.has_chat_template:
            raise UserError(
                f"data.prompt: prompts from {self.cfg.label} need a chat template and the model has none; use an "
                "instruct model, or text prompts with chat_template: never"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.cfg.system is not None and isinstance(prompt, str):
            messages = with_system(messages, self.cfg.system, self._row(index))
        try:
            return rendered_ids(self.tokenizer, messages, tools, self.cfg.chat_template_kwargs)
        except Exception as error:  # the template is the model's own code
            raise UserError(
                f"data.prompt: the model's chat template refuses {self._row(index)}: {one_line(error)}"
            ) from error


def last_text(prompt: str | list[Message]) -> str:
    """A prompt as one text, for people: of messages the last, but for the beginning of an answer."""
    if isinstance(prompt, str):
        return prompt
    asked = [message for message in prompt if message["role"] != "assistant"]
    return text_of(asked[-1] if asked else prompt[-1])
