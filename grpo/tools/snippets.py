"""Code for the model card that uses an export with prompts like the run's prompts."""

from __future__ import annotations

import json
import shlex

from grpo.config import DataConfig, ModelConfig
from grpo.model.load import model_folder

FOLDER, BASE = "FOLDER", "BASE"

PEFT = """{imports}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), {adapter!r})
{inputs}
answer = model.generate(**inputs, max_new_tokens={length})[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
CHAT = """messages = {messages}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{kwargs}
)"""


def snippet(form: str, base: str, repo: str | None, model: ModelConfig, data: DataConfig, length: int) -> str:
    """Return a fenced block of shell or Python that answers a prompt with the export, in at most `length` tokens.

    `base` is the name or folder from which other programs load the model. The export is in the Hub repository `repo`,
    or in a FOLDER. `model` and `data` are the run's sections.
    """
    if form == "peft":
        return f"```python\n{_peft(base, repo or FOLDER, model, data, length)}\n```"
    lines = [f"mlx_lm.generate --model {repo or FOLDER} {_flags(data, length)}"]
    if form == "mlx":
        lines = [f"mlx_lm.generate --model {base} --adapter-path {FOLDER} {_flags(data, length)}"]
        if repo is not None:  # mlx-lm only loads adapters from folders
            lines.insert(0, f"hf download {repo} --local-dir {FOLDER}")
    return "\n".join(["```sh", *lines, "```"])


def _flags(data: DataConfig, length: int) -> str:
    """Return the flags of mlx_lm.generate for a prompt like the run's prompts."""
    flags = [f"--max-tokens {length}"]
    if data.chat_template == "never":  # by default, mlx-lm uses the template if there is one
        flags.append("--ignore-chat-template")
    if data.system is not None:
        flags.append(f"--system-prompt {shlex.quote(data.system)}")
    if data.chat_template_kwargs:
        flags.append(f"--chat-template-config {shlex.quote(json.dumps(data.chat_template_kwargs))}")
    return " ".join([*flags, f"--prompt {shlex.quote(_prompt(data))}"])


def _peft(base: str, adapter: str, model: ModelConfig, data: DataConfig, length: int) -> str:
    home = base.startswith("~")  # Python does not expand `~`
    inputs = f'inputs = tokenizer({_prompt(data)!r}, return_tensors="pt")'
    if _wraps(model, data):
        system = [] if data.system is None else [{"role": "system", "content": data.system}]
        messages = [*system, {"role": "user", "content": _prompt(data)}]
        kwargs = "".join(f", {name}={value!r}" for name, value in data.chat_template_kwargs.items())
        inputs = CHAT.format(messages=messages, kwargs=kwargs)
    return PEFT.format(
        imports="from os.path import expanduser\n\n" if home else "",
        base=f"expanduser({base!r})" if home else repr(base),
        adapter=adapter,
        inputs=inputs,
        length=length,
    )


def _prompt(data: DataConfig) -> str:
    """Return the run's template, whose columns the reader fills in; dots if one column was the whole prompt."""
    return data.prompt if "{" in data.prompt else "..."


def _wraps(model: ModelConfig, data: DataConfig) -> bool:
    """Whether the run's text prompts went through the base's chat template."""
    if data.chat_template == "auto" and data.system is None:
        folder = model_folder(model)
        told = [file.read_text("utf-8") for file in folder.glob("tokenizer_config.json")]
        return any('"chat_template"' in text for text in told) or any(folder.glob("chat_template*"))
    return data.chat_template != "never"
