"""What leaves a run: adapters and weights that others read, and that compute the same."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import yaml

from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.adapters import load_adapter
from grpo.model.load import load
from grpo.model.mlxlm import load_model
from grpo.model.quantized import Quantization, quantization
from grpo.recipes import load_recipe, with_settings
from grpo.tools import card
from grpo.tools.export import _fitting, export, peft_name

TOKENS = [[1, 5, 9, 3, 7, 2, 8, 4]]


@pytest.fixture
def trained(recipe, run_cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, in the working directory, of a run whose adapter has moved far."""
    recipe.write_text(recipe.read_text() + "eval: {split: train, prompts: 2, samples: 2}\n")
    kept = tmp_path_factory.getbasetemp() / "run-to-export"
    if not kept.exists():
        ran = run_cli("train", recipe, "optim.learning_rate=0.05", "optim.steps=3", "adapter.rank=4")
        assert ran.code == 0, ran.err
        shutil.copytree("runs/toy", kept)
    else:
        shutil.copytree(kept, "runs/toy")
    return Path("runs/toy")


def logits(model) -> mx.array:
    return model(mx.array(TOKENS)).astype(mx.float32)


def with_adapter(toy_folder: Path, adapter: Path):
    model, _ = load(ModelConfig(name=str(toy_folder)))
    base = logits(model)
    load_adapter(model, adapter)
    moved = logits(model)
    assert mx.abs(moved - base).max().item() > 0.1  # or else the comparisons below would say nothing
    return moved


def test_an_mlx_adapter_is_what_mlx_lm_loads(trained, toy_folder, run_cli) -> None:
    ran = run_cli("export", trained, "--format", "mlx", "--to", "given/away")
    assert ran.code == 0, ran.err
    newest = trained / "checkpoints/step-000003"
    assert mx.array_equal(with_adapter(toy_folder, Path("given/away")), with_adapter(toy_folder, newest))
    assert "exists already" in run_cli("export", trained, "--format", "mlx", "--to", "given/away").err


def test_peft_gives_the_same_logits(trained, toy_folder) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    made = export(trained, "peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(toy_folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(made.folder)).eval()
    with torch.no_grad():
        theirs = mx.array(model(torch.tensor(TOKENS)).logits.numpy())
    ours = with_adapter(toy_folder, trained / "checkpoints/step-000003")
    assert mx.abs(theirs - ours).max().item() < 1e-4


def test_a_peft_adapter_by_hand(trained) -> None:
    made = export(trained, "peft")
    ours = mx.load(str(trained / "checkpoints/step-000003/adapters.safetensors"))
    theirs = mx.load(str(made.folder / "adapter_model.safetensors"))
    assert set(theirs) == {peft_name(path) for path in ours}
    path = "model.layers.0.self_attn.q_proj.lora_"
    assert mx.array_equal(theirs[f"base_model.{'model.' + path}A.weight"], ours[path + "a"].T)
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)  # scale 2
    assert (config["use_rslora"], config["lora_dropout"]) == (False, 0.0)
    assert "model.layers.1.mlp.down_proj" in config["target_modules"]
    assert not made.notes


def test_fused_weights_are_a_model(trained, toy_folder) -> None:
    made = export(trained, "fused")
    model, tokenizer = load(ModelConfig(name=str(made.folder)))
    ours = with_adapter(toy_folder, trained / "checkpoints/step-000003")
    assert mx.abs(logits(model) - ours).max().item() < 1e-4
    assert tokenizer.has_chat_template
    assert made.notes[-1].startswith("KL divergence from the base plus adapter")


def test_quantised_fused_weights_say_what_it_cost(trained, toy_folder) -> None:
    gaps = {}
    for asked, bits, said in ((4, 4, "4 bits"), (8, 8, "8 bits"), ("mxfp8", 8, "mxfp8")):
        made = export(trained, "fused", Path(f"q{asked}"), to_quantize=asked)
        config = json.loads((made.folder / "config.json").read_text())
        assert (config["quantization"]["bits"], config["quantization"]["mode"]) == (bits, quantization(asked).mode)
        load_model(made.folder)  # as mlx-lm does
        assert f"quantized to {said} after" in made.notes[0]
        gaps[asked] = float(made.notes[1].split("arithmetic: ")[1].split()[0])
    assert gaps[4] > gaps["mxfp8"] > gaps[8] > 0


def test_a_quantised_base_is_fused_without_loss(recipe, run_cli, toy_folder) -> None:
    """To quantise base + adapter again would round a small adapter away; so it is written unquantised, and said."""
    from mlx_lm.utils import load_config, quantize_model, save

    model, tokenizer = load(ModelConfig(name=str(toy_folder)))
    model, config = quantize_model(model, load_config(toy_folder), group_size=64, bits=4)
    save("quantised", toy_folder, model, tokenizer, config)
    ran = run_cli("train", recipe, "model.name=quantised", "optim.learning_rate=1e-5", "adapter.targets=[mlp.up_proj]")
    assert ran.code == 0, ran.err
    made = export(Path("runs/toy"), "fused")
    assert "these weights are not" in made.notes[0]
    assert "quantization" not in json.loads((made.folder / "config.json").read_text())
    whole, _ = load(ModelConfig(name=str(made.folder)))
    adapted, _ = load(ModelConfig(name="quantised"))
    base = logits(adapted)
    load_adapter(adapted, Path("runs/toy/checkpoints/step-000002"))
    moved = mx.abs(logits(adapted) - base).max().item()
    assert 0 < moved < 1e-2
    assert mx.abs(logits(whole) - logits(adapted)).max().item() < moved / 100
    assert "quantized" in export(Path("runs/toy"), "peft").notes[0]


def test_a_base_quantised_by_the_recipe_is_said(recipe, run_cli, toy_folder) -> None:
    ran = run_cli("train", recipe, "model.quantize=4", "optim.learning_rate=0.05", "adapter.targets=[mlp.up_proj]")
    assert ran.code == 0, ran.err
    run = Path("runs/toy")
    assert "--q-bits 4 --q-group-size 64" in export(run, "mlx").notes[0]
    assert "the base was quantized in training" in export(run, "peft").notes[0]
    made = export(run, "fused")
    assert "these weights are not" in made.notes[0]
    whole, _ = load(ModelConfig(name=str(made.folder)))
    adapted, _ = load(ModelConfig(name=str(toy_folder), quantize=4))
    load_adapter(adapted, run / "checkpoints/step-000002")
    assert mx.abs(logits(whole) - logits(adapted)).max().item() < 1e-4


@pytest.mark.parametrize(("kind", "said"), [("dora", "DoRA adapter (mlx-lm"), ("full", "Trained weights (mlx-lm")])
def test_what_is_not_lora_is_exported_and_called_so(recipe, run_cli, toy_folder, kind: str, said: str) -> None:
    assert run_cli("train", recipe, f"adapter.type={kind}", "optim.learning_rate=0.02").code == 0
    run = Path("runs/toy")
    moved = with_adapter(toy_folder, export(run, "mlx").folder)
    text = (run / "export-mlx/README.md").read_text()
    assert said in text
    assert kind in yaml.safe_load(text.split("---")[1])["tags"]
    whole, _ = load(ModelConfig(name=str(export(run, "fused").folder)))
    assert mx.abs(logits(whole) - moved).max().item() < 1e-4
    with pytest.raises(UserError, match="--format fused supports"):
        export(run, "peft")


def test_the_card_says_what_it_is(trained) -> None:
    text = (export(trained, "mlx", which="best").folder / "README.md").read_text()
    matter = yaml.safe_load(text.split("---")[1])
    assert matter["library_name"] == "mlx"
    assert "lora" in matter["tags"]
    for said in ("GRPO", "`digits.py:reward` × 1", "pass@2", "on `train.jsonl`", "mlx-lm 0.", "rank: 4", "## Recipe"):
        assert said in text
    assert str(Path.cwd()) not in text  # where things lie on a machine is nobody else's business


def test_a_card_names_the_folder_of_a_builtin_model(trained, monkeypatch) -> None:
    """Other programs know nothing of our names."""
    kept = Path.home() / ".cache/grpo/arithmetic-student-123"
    monkeypatch.setattr(card, "model_folder", lambda cfg: kept)
    cfg = load_recipe(trained / "recipe.yaml")
    cfg = with_settings(cfg, {"model.name": "builtin:arithmetic-student"})
    text = card.model_card(cfg, trained / "checkpoints/step-000003", "mlx", [])
    assert "mlx_lm.generate --model ~/.cache/grpo/arithmetic-student-123 --adapter-path" in text
    text = card.model_card(cfg, trained / "checkpoints/step-000003", "peft", [])
    assert "base = expanduser('~/.cache/grpo/arithmetic-student-123')" in text
    monkeypatch.setattr(card, "model_folder", lambda cfg: Path("/models/made"))
    assert "--model /models/made " in card.model_card(cfg, trained / "checkpoints/step-000003", "mlx", [])


def test_a_public_card_has_no_folder_of_this_machine(trained, monkeypatch) -> None:
    monkeypatch.setattr(card, "model_folder", lambda cfg: Path("/models/made"))
    cfg = load_recipe(trained / "recipe.yaml")
    cfg = with_settings(cfg, {"model.name": "builtin:arithmetic-student"})
    for form in ("mlx", "peft", "fused"):
        text = card.model_card(cfg, trained / "checkpoints/step-000003", form, [], "me/mine")
        assert "/models/made" not in text
        assert "me/mine" in text
        assert ("`grpo generate builtin:arithmetic-student hi` saves it" in text) == (form != "fused")


def test_a_base_that_is_on_this_machine_alone_is_not_named_to_others(trained, toy_folder) -> None:
    """PEFT loads the base by its name in the config: a folder serves here, and not those who read a repository."""
    kept = export(trained, "peft").folder
    sent = export(trained, "peft", Path("sent"), repo="me/mine").folder
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (kept, sent))
    assert ours["base_model_name_or_path"] == str(toy_folder.resolve())
    assert theirs["base_model_name_or_path"] is None


def test_a_card_has_no_path_of_this_machine_however_long(trained, tmp_path) -> None:
    """YAML breaks long lines at spaces, in paths too; rewards' arguments may be paths, and the start is one."""
    here = tmp_path / "a folder with a name of many words, that a line of YAML cannot hold, because it is longer"
    here.mkdir()
    (here / "words.txt").touch()
    cfg = load_recipe(trained / "recipe.yaml")
    reward = with_settings(cfg.rewards[0], {"kwargs": {"words": str(here / "words.txt"), "tag": "/think"}})
    places = {"adapter.path": str(here), "data.source": (str(here / "gone.jsonl"),)}
    cfg = with_settings(cfg, {"rewards": (reward,), **places})
    text = card.model_card(cfg, trained / "checkpoints/step-000003", "mlx", [])
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["rewards"][0]["kwargs"] == {"words": "words.txt", "tag": "/think"}
    assert recipe["adapter"]["path"] == here.name
    assert recipe["data"]["source"] == ["gone.jsonl"]


def test_peft_is_told_of_rslora_and_dropout(recipe, run_cli) -> None:
    """PEFT multiplies by alpha / √r: what mlx-lm's config says must come out of it."""
    kind = ["adapter.rank=4", "adapter.scale=6.0", "adapter.use_rslora=true", "adapter.dropout=0.1"]
    assert run_cli("train", recipe, *kind).code == 0
    config = json.loads((export(Path("runs/toy"), "peft").folder / "adapter_config.json").read_text())
    ours = json.loads(Path("runs/toy/checkpoints/step-000002/adapter_config.json").read_text())["lora_parameters"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_dropout"]) == (4, 6.0, True, 0.1)
    assert config["lora_alpha"] / 4**0.5 == ours["scale"] == 3.0
    assert ours["dropout"] == 0.1


def test_what_cannot_be_exported(trained, run_cli, tmp_path) -> None:
    for args, said in (
        ([tmp_path, "--format", "mlx"], "not a run's folder"),
        ([trained, "--format", "peft", "--quantize", "4"], "--quantize requires --format fused"),
        ([trained, "--format", "mlx", "--checkpoint", "9"], "no checkpoint of step 9"),
        ([trained, "--format", "mlx", "--to", "train.jsonl/x"], "cannot write train.jsonl/x"),
    ):
        ran = run_cli("export", *args)
        assert (ran.code, len(ran.err.splitlines())) == (2, 1)
        assert said in ran.err


def test_it_is_pushed_to_the_hub_or_says_why_not(trained, run_cli, monkeypatch) -> None:
    import huggingface_hub

    sent = []

    class Hub:
        def create_repo(self, repo: str, exist_ok: bool) -> str:
            sent.append((repo, exist_ok))
            return f"hub://{repo}"

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            sent.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "HfApi", Hub)
        ran = run_cli("export", trained, "--format", "mlx", "--push-to-hub", "me/mine")
    assert ran.out.splitlines()[-1] == "hub://me/mine"
    assert sent == [("me/mine", True), ("me/mine", ["README.md", "adapter_config.json", "adapters.safetensors"])]
    assert "hf download me/mine --local-dir FOLDER" in (trained / "export-mlx/README.md").read_text()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused = run_cli("export", trained, "--format", "mlx", "--to", "again", "--push-to-hub", "me/mine")
    assert refused.code == 2
    assert "--push-to-hub me/mine: " in refused.err
    assert Path("again/README.md").is_file()


def test_an_upload_that_fails_is_one_line_that_says_where_the_export_is(trained, run_cli, monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    def refused(status: int) -> HfHubHTTPError:
        answer = httpx.Response(status, request=httpx.Request("POST", "https://hub.invalid/api"))
        return HfHubHTTPError(f"{status} Client Error\nfor url", response=answer)

    for number, (error, said) in enumerate(
        [
            (httpx.ConnectError("[Errno -2] Name or service not known"), "cannot be reached"),
            (httpx.ReadTimeout("timed out"), "no answer within"),
            (refused(401), "HF_TOKEN"),
            (refused(403), "no write access"),
            (refused(409), "409 Client Error"),
        ]
    ):

        class Hub:
            def create_repo(self, repo: str, exist_ok: bool, error: Exception = error) -> str:
                raise error

        monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
        ran = run_cli("export", trained, "--format", "mlx", "--to", f"e{number}", "--push-to-hub", "me/mine")
        assert (ran.code, len(ran.err.splitlines())) == (2, 1)
        assert said in ran.err
        assert f"the export is in e{number}" in ran.err
        assert Path(f"e{number}/README.md").is_file()


def test_layers_that_do_not_divide_into_groups_cannot_be_quantised(toy_folder) -> None:
    model, _ = load(ModelConfig(name=str(toy_folder)))
    assert _fitting(model, 4) == Quantization(64, 4)
    assert _fitting(model, "nvfp4") == Quantization(16, 4, "nvfp4")
    model.model.layers[0].mlp.up_proj.weight = mx.zeros((4, 30))
    with pytest.raises(UserError, match="not divisible into groups of 32"):
        _fitting(model, 4)
    with pytest.raises(UserError, match="not divisible into groups of 16"):
        _fitting(model, "nvfp4")
