"""Reward models: the scores of transformers' classifiers, in batches, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from model.classifiers import KINDS, VOCABULARY, config_of, reward_model, save, score, weights_of, write

from grpo.backend import cuda
from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.batched import batches
from grpo.model.classifier import Classifier, check_labels, load_classifier

DRAW = random.Random(0)
ROWS = [[DRAW.randrange(VOCABULARY) for _ in range(length)] for length in (7, 1, 31, 12, 30)]


@pytest.fixture
def tokenizer(toy_folder: Path) -> Path:
    return toy_folder


def loaded(folder: Path, **settings: object) -> Classifier:
    return load_classifier(ModelConfig.model_validate({"name": str(folder), **settings}))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_transformers(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    """Rows of several lengths in one batch, padded; against the same computed one by one in float64."""
    folder = reward_model(tmp_path / "model", tokenizer, kind)
    config = json.loads((folder / "config.json").read_text())
    weights = weights_of(config)
    expected = [score(config, weights, row) for row in ROWS]
    assert np.std(expected) > 0.2, "or nothing would be compared"
    classifier = loaded(folder)
    for most in (1, 64, 1000):  # each alone, two batches of several, all together
        assert classifier.scores(ROWS, most) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_transformers_that_is_installed(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = reward_model(tmp_path / "model", tokenizer, kind, pad_token_id=0)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    width = max(map(len, ROWS))
    rows = [*ROWS, [5, 6, 0, 7, 0, 0]]
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask).logits[:, 0].tolist()
    assert loaded(folder).scores(rows, 1000) == pytest.approx(expected, abs=1e-4)


def test_the_score_is_read_where_transformers_reads_it(tmp_path: Path, tokenizer: Path) -> None:
    """At the last token that is not the padding's, even if the text itself ends with some; at the first if all are."""
    folder = reward_model(tmp_path / "model", tokenizer, pad_token_id=3)
    config = json.loads((folder / "config.json").read_text())
    rows = [[5, 6, 3, 7, 3, 3], [3, 3], [9, 4]]
    expected = [score(config, weights_of(config), row) for row in rows]
    assert loaded(folder).scores(rows, 100) == pytest.approx(expected, abs=1e-4)
    assert expected[0] == pytest.approx(score(config, weights_of(config), [5, 6, 3, 7]), abs=1e-9)


def test_batches_hold_as_many_as_asked_for_longest_first() -> None:
    assert batches([3, 9, 9, 2, 10], 20) == [[4, 1], [2, 0], [3]]
    assert batches([3, 9, 9, 2, 10], 27) == [[4, 1], [2, 0, 3]]
    assert batches([30, 2, 2, 2], 4) == [[0], [1, 2], [3]]
    assert batches([], 4) == []


def test_on_cuda_rows_have_the_lengths_that_attention_is_fused_for(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = loaded(reward_model(tmp_path / "model", tokenizer))
    before = classifier.scores(ROWS, 1000)
    monkeypatch.setattr(cuda, "available", lambda: True)
    assert batches([7, 1, 129], 256) == [[2], [0, 1]]
    widths = []
    body = classifier.model.model
    monkeypatch.setattr(type(body), "__call__", watched(type(body).__call__, widths))
    assert classifier.scores(ROWS, 1000) == pytest.approx(before, abs=1e-5)
    assert widths == [128]


def watched(call, widths: list[int]):
    def watching(self, tokens, *args, **kwargs):
        widths.append(tokens.shape[1])
        return call(self, tokens, *args, **kwargs)

    return watching


def test_weights_may_be_quantised_and_the_score_is_not(tmp_path: Path, tokenizer: Path) -> None:
    folder = reward_model(tmp_path / "model", tokenizer, hidden_size=64, intermediate_size=64)
    classifier = loaded(folder, quantize=8)
    assert "scales" in classifier.model.model.layers[0].mlp.up_proj
    assert classifier.model.score.weight.dtype == mx.float32
    assert classifier.scores(ROWS, 1000) == pytest.approx(loaded(folder).scores(ROWS, 1000), abs=0.1)
    assert loaded(folder, dtype="bfloat16").model.score.weight.dtype == mx.bfloat16


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        loaded(folder)
    return str(error.value)


def test_what_is_no_reward_model_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    several = reward_model(tmp_path / "several", tokenizer, id2label={"0": "a", "1": "b", "2": "c"}, labels=3)
    assert "has 3 labels, but a reward model has one label: the score" in refused(several)
    with pytest.raises(UserError, match="has 3 labels"):  # known from the config, before any weights are fetched
        check_labels(json.loads((several / "config.json").read_text()), "org/several")
    quiet = reward_model(tmp_path / "quiet", tokenizer, labels=2)
    assert "has 2 labels" in refused(quiet)
    assert "is a Qwen3ForCausalLM, but a reward model must be a sequence classifier" in refused(
        reward_model(tmp_path / "causal", tokenizer, architectures=["Qwen3ForCausalLM"])
    )
    config = config_of("qwen3")
    weights = {name: array for name, array in weights_of(config).items() if name != "score.weight"}
    assert "its weights have no score.weight" in refused(write(tmp_path / "none", config, weights, tokenizer))
    kind = {"model_type": "deberta-v2", "architectures": ["DebertaV2ForSequenceClassification"]}
    foreign = reward_model(tmp_path / "foreign", tokenizer, **kind)
    assert "deberta-v2" in refused(foreign)
    missing = {name: array for name, array in weights_of(config).items() if "up_proj" not in name}
    assert "up_proj" in refused(write(tmp_path / "missing", config, missing, tokenizer))


def test_a_tokenizer_must_be_there_and_know_chats(tmp_path: Path, tokenizer: Path) -> None:
    folder = reward_model(tmp_path / "model", tokenizer)
    settings = folder / "tokenizer_config.json"
    kept = json.loads(settings.read_text())
    settings.write_text(json.dumps({name: value for name, value in kept.items() if name != "chat_template"}))
    assert "its tokenizer has no chat template" in refused(folder)
    settings.write_text(json.dumps(kept))
    small = reward_model(tmp_path / "small", tokenizer)
    config = config_of("qwen3", 50)
    (small / "config.json").write_text(json.dumps(config))
    save(small, weights_of(config))
    assert "but the model's vocabulary has only 50 tokens: the tokenizer belongs to another model" in refused(small)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(folder)
