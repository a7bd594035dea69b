"""A card's front matter: the base's license where its own card says it, and data from the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grpo.config import DataConfig, ModelConfig, Recipe
from grpo.tools.card import _front_matter
from grpo.tools.license import license_of

OTHER = {"license": "other", "license_name": "qwen-research", "license_link": "https://base.example/LICENSE"}


def base(folder: Path, text: str) -> ModelConfig:
    (folder / "README.md").write_text(text)
    return ModelConfig(name=str(folder))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# A base\n", {"license": "apache-2.0"}),
        (f"---\n{yaml.safe_dump(OTHER)}---\n", OTHER),
        ("---\nlicense: other\nlicense_link: LICENSE\n---\n", {"license": "other"}),
        ("---\nlicense_name: mine\n---\n", {}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}),
        ("---\ntags: [a]\n---\nlicense: mit\n", {}),
        ("---\nlicense: mit\n", {}),
        ("license: mit\n", {}),
        ("---\n- license\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("", {}),
    ],
)
def test_a_license_is_what_the_bases_card_says(tmp_path, text: str, said: dict[str, str]) -> None:
    assert license_of(base(tmp_path, text)) == said


def test_a_license_that_is_not_known_is_not_invented(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    for name in (str(tmp_path), "builtin:arithmetic-student", "nobody/never-fetched"):
        assert license_of(ModelConfig(name=name)) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert license_of(ModelConfig(name=str(tmp_path))) == {}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"source": "openai/gsm8k"}, ["openai/gsm8k"]),
        ({"source": "train.jsonl"}, None),
        ({"source": ("a.jsonl", "b.jsonl")}, None),
        ({"source": "builtin:sums"}, None),
        ({"source": "./data"}, None),
        ({"use": "mine.py:rows"}, None),
    ],
)
def test_datasets_are_those_of_the_hub(tmp_path, monkeypatch, data: dict, named: list[str] | None) -> None:
    monkeypatch.chdir(tmp_path)
    sections = {"model": base(tmp_path, "---\nlicense: mit\n---\n"), "data": DataConfig(**data)}
    cfg = Recipe(**sections, rewards=({"use": "exact"},), optim={"steps": 1})
    matter = _front_matter(cfg, "mlx")
    assert (matter.get("datasets"), matter["license"], "base_model" in matter) == (named, "mit", False)
    other = cfg.model_copy(update={"model": ModelConfig(name="Qwen/Qwen3-0.6B")})
    assert _front_matter(other, "mlx")["base_model"] == "Qwen/Qwen3-0.6B"
