"""How an export is used, as code for its model card: prompted as the run's prompts were."""

from __future__ import annotations

import json
import shlex

from grpo.config import Recipe
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


def snippet(cfg: Recipe, form: str, base: str, repo: str | None) -> str:
    """A fenced piece of shell or Python that answers a prompt with the export.

    `base` is the model as other programs load it; the export is in the Hub repository `repo`, or in a FOLDER.
    """
    if form == "peft":
        return f"```python\n{_peft(cfg, base, repo or FOLDER)}\n```"
    lines = [f"mlx_lm.generate --model {repo or FOLDER} {_flags(cfg)}"]
    if form == "mlx":
        lines = [f"mlx_lm.generate --model {base} --adapter-path {FOLDER} {_flags(cfg)}"]
        if repo is not None:  # mlx-lm takes adapters from folders alone
            lines.insert(0, f"hf download {repo} --local-dir {FOLDER}")
    return "\n".join(["```sh", *lines, "```"])


def _flags(cfg: Recipe) -> str:
    """mlx_lm.generate's, for a prompt as the run had them."""
    data, flags = cfg.data, [f"--max-tokens {cfg.rollout.max_completion_length}"]
    if data.chat_template == "never":  # or else mlx-lm uses the template if there is one
        flags.append("--ignore-chat-template")
    if data.system is not None:
        flags.append(f"--system-prompt {shlex.quote(data.system)}")
    if data.chat_template_kwargs:
        flags.append(f"--chat-template-config {shlex.quote(json.dumps(data.chat_template_kwargs))}")
    return " ".join([*flags, f"--prompt {shlex.quote(_prompt(cfg))}"])


def _peft(cfg: Recipe, base: str, adapter: str) -> str:
    home = base.startswith("~")  # Python does not expand it by itself
    inputs = f'inputs = tokenizer({_prompt(cfg)!r}, return_tensors="pt")'
    if _wraps(cfg):
        system = [] if cfg.data.system is None else [{"role": "system", "content": cfg.data.system}]
        messages = [*system, {"role": "user", "content": _prompt(cfg)}]
        kwargs = "".join(f", {name}={value!r}" for name, value in cfg.data.chat_template_kwargs.items())
        inputs = CHAT.format(messages=messages, kwargs=kwargs)
    return PEFT.format(
        imports="from os.path import expanduser\n\n" if home else "",
        base=f"expanduser({base!r})" if home else repr(base),
        adapter=adapter,
        inputs=inputs,
        length=cfg.rollout.max_completion_length,
    )


def _prompt(cfg: Recipe) -> str:
    """The run's template, for its columns to be filled in; dots where a column was the whole prompt."""
    return cfg.data.prompt if "{" in cfg.data.prompt else "..."


def _wraps(cfg: Recipe) -> bool:
    """Whether the run's text prompts went through the base's chat template."""
    if cfg.data.chat_template == "auto" and cfg.data.system is None:
        folder = model_folder(cfg.model)
        told = [file.read_text("utf-8") for file in folder.glob("tokenizer_config.json")]
        return any('"chat_template"' in text for text in told) or any(folder.glob("chat_template*"))
    return cfg.data.chat_template != "never"
