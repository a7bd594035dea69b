"""A model card's code: whole, prompted as the run was, and true of where the export is."""

from __future__ import annotations

import ast
import shlex

import pytest

from grpo.config import Recipe
from grpo.tools import snippets


def recipe(folder, **data) -> Recipe:
    sections = {
        "model": {"name": str(folder)},
        "data": {"source": "d.jsonl", "prompt": "{question} Think first.", **data},
        "rewards": [{"use": "r"}],
        "optim": {"steps": 1},
        "rollout": {"max_completion_length": 33},
    }
    return Recipe.model_validate(sections, strict=False)


def snippet(cfg: Recipe, form: str, base: str, repo: str | None) -> str:
    return snippets.snippet(form, base, repo, cfg.model, cfg.data, cfg.rollout.max_completion_length)


def code(text: str, language: str) -> str:
    first, *lines, last = text.splitlines()
    assert (first, last) == (f"```{language}", "```")
    return "\n".join(lines)


def test_shell_for_mlx_lm(toy_folder) -> None:
    from mlx_lm.generate import setup_arg_parser

    cfg = recipe(toy_folder, system="It's short.", chat_template_kwargs={"enable_thinking": False})
    name, *flags = shlex.split(code(snippet(cfg, "mlx", "some/base", None), "sh"))
    assert name == "mlx_lm.generate"
    asked = setup_arg_parser().parse_args(flags)
    assert (asked.model, asked.adapter_path, asked.max_tokens) == ("some/base", "FOLDER", 33)
    assert (asked.prompt, asked.system_prompt) == ("QUESTION Think first.", "It's short.")
    assert asked.chat_template_config == '{"enable_thinking": false}'
    assert not asked.ignore_chat_template
    bare = snippet(recipe(toy_folder, chat_template="never", prompt="question"), "fused", "some/base", "me/mine")
    assert code(bare, "sh") == "mlx_lm.generate --model me/mine --max-tokens 33 --ignore-chat-template --prompt ..."
    fetch, use = code(snippet(cfg, "mlx", "some/base", "me/mine"), "sh").splitlines()
    assert fetch == "hf download me/mine --local-dir FOLDER"
    assert "--adapter-path FOLDER" in use


@pytest.mark.parametrize("template", ["auto", "never"])
def test_python_for_peft(toy_folder, template: str) -> None:
    text = code(snippet(recipe(toy_folder, chat_template=template), "peft", "some/base", "me/mine"), "python")
    ast.parse(text)
    assert "from_pretrained(base), 'me/mine')" in text
    assert "base = 'some/base'" in text
    assert ("apply_chat_template" in text) == (template == "auto")
    assert "QUESTION Think first." in text
    assert "max_new_tokens=33" in text
    assert text.splitlines()[-1].startswith("print(tokenizer.decode(answer")


def test_a_base_without_a_template_is_not_asked_for_it(toy_folder, tmp_path) -> None:
    assert "apply_chat_template" not in snippet(recipe(tmp_path), "peft", "base", None)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert "apply_chat_template" in snippet(recipe(tmp_path), "peft", "base", None)
    text = code(snippet(recipe(tmp_path), "peft", "~/made", None), "python")
    ast.parse(text)
    assert "base = expanduser('~/made')" in text
    assert "'FOLDER')" in text
