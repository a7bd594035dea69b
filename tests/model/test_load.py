"""Loading: what is wrong with a model's folder is said in one line."""

import json
import logging
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from grpo.builtin import models
from grpo.builtin.student import Student
from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.load import load
from grpo.model.mlxlm import new_model


@pytest.fixture
def copy(toy_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_folder, tmp_path / "model"))


def refused(folder: Path | str) -> str:
    with pytest.raises(UserError) as error:
        load(ModelConfig(name=str(folder)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_are_float32_on_a_cpu_and_frozen(copy: Path) -> None:
    weights = mx.load(str(copy / "model.safetensors"))
    half = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    mx.save_safetensors(str(copy / "model.safetensors"), half, metadata={"format": "mlx"})
    model, _ = load(ModelConfig(name=str(copy)))
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.float32}
    assert model.trainable_parameters() == {} or not tree_flatten(model.trainable_parameters())
    kept, _ = load(ModelConfig(name=str(copy), dtype="bfloat16"))
    assert {array.dtype for _, array in tree_flatten(kept.parameters())} == {mx.bfloat16}


def test_a_text_longer_than_the_model_reads_is_no_alarm(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, tokenizer = load(ModelConfig(name=str(copy)))
    tokenizer._tokenizer.model_max_length = 8
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        assert len(tokenizer.encode("7 " * 20)) > 8
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.records == []


def test_no_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert "no config.json" in refused(copy)


def test_no_such_folder() -> None:
    assert "there is no such folder" in refused("./nowhere")


def test_unknown_builtin() -> None:
    assert "builtin:arithmetic-student" in refused("builtin:nothing")


def test_unknown_architecture(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "unheard_of"}
    (copy / "config.json").write_text(json.dumps(config))
    assert "unheard_of" in refused(copy)


def test_weights_that_do_not_match(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"intermediate_size": 100}
    (copy / "config.json").write_text(json.dumps(config))
    assert "shape" in refused(copy)


def test_missing_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "no model*.safetensors in" in refused(copy)


def test_truncated_weights(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert str(copy) in refused(copy)


def test_damaged_config(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert str(copy) in refused(copy)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused("someone/some-model")
    assert "model someone/some-model: cannot be downloaded from" in message
    assert constants.ENDPOINT in message


def test_a_builtin_model_is_made_once_and_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "builtin:arithmetic-student", Student(steps=3, warmup=1))
    made = []
    for name in ("a", "b"):
        monkeypatch.setenv("GRPO_CACHE", str(tmp_path / name))
        folder = models.folder("builtin:arithmetic-student", new_model)
        stamp = folder.stat().st_mtime_ns
        assert models.folder("builtin:arithmetic-student", new_model).stat().st_mtime_ns == stamp
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert made[0] == made[1]
    assert set(made[0]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "file"))
    assert "GRPO_CACHE" in refused("builtin:arithmetic-student")
