"""What a user does with the Hub, against the stand-in: the commands that they run, and what they see."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub.layouts import sharded_model
from hub.server import READER, STRANGER, WRITER, Failure, Hub

from grpo.config import DataConfig, ModelConfig
from grpo.data.prompts import PromptRenderer
from grpo.model.load import load

RECIPE = Path(__file__).parents[2] / "recipes/qwen3-math.yaml"
SMALL = (
    *("optim.steps=1", "optim.warmup_steps=0", "rollout.prompts_per_step=2", "rollout.num_generations=2"),
    *("rollout.max_completion_length=8", "eval.prompts=2", "eval.samples=1", "log.wandb=null"),
)
"""The recipe as it is, but small."""
DRY = ("train", RECIPE, "--dry-run", *SMALL, "output_dir=dry")


def push(to: str, repository: str = "writer/mine") -> list[str]:
    return ["export", "run", "--format", "mlx", "--to", to, "--push-to-hub", repository]


def generate(name: str = "Qwen/Qwen3-0.6B") -> list[str]:
    return ["generate", name, "hello", "--max-tokens", "1"]


def last_line(text: str) -> str:
    """The error, after what progress bars and warnings have left."""
    return text.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, qwen3_folder: Path, gsm8k_folder: Path) -> Iterator[Hub]:
    """A Hub that the recipe has been trained from, with the run in its folder `run`."""
    hub = Hub(tmp_path_factory.mktemp("trained") / "hf")
    hub.add_model("Qwen/Qwen3-0.6B", qwen3_folder)
    hub.add_dataset("openai/gsm8k", gsm8k_folder)
    ran = hub.grpo("train", RECIPE, *SMALL, "output_dir=run")
    assert ran.returncode == 1, ran.stderr
    assert "nothing was trained" in ran.stderr  # the toy answers no question of GSM8K; the run is kept all the same
    assert "Qwen/Qwen3-0.6B on openai/gsm8k" in ran.stdout
    assert "eval at step 1" in ran.stdout
    assert {request.status for request in hub.asked("GET /cdn/")} == {200}
    yield hub
    hub.stop()


@pytest.mark.slow
def test_what_was_fetched_once_is_not_fetched_again_nor_needs_the_hub(trained: Hub) -> None:
    trained.requests.clear()
    again = trained.grpo(*DRY)
    assert (again.returncode, again.stderr.count("using the copy in the cache")) == (0, 0), again.stderr
    assert trained.asked("/api/models/Qwen/Qwen3-0.6B")
    assert not trained.asked("GET .*(/cdn/|/resolve/)")
    trained.stop()
    try:
        dead, config, commit, unsent = trained.several(
            DRY, [*DRY, "data.config=socratic"], [*DRY, f"data.revision={'a' * 40}"], push("unsent")
        )
    finally:
        trained.start()
    assert dead.returncode == 0, dead.stderr
    assert "model Qwen/Qwen3-0.6B: using the copy in the cache: the Hub cannot be reached ([Errno" in dead.stderr
    assert dead.stderr.count("data openai/gsm8k: using the copy in the cache: the Hub cannot be reached") == 1
    for other in (config, commit):  # `datasets` would hand out whatever it cached last
        assert other.returncode == 2
        assert "the Hub cannot be reached" in last_line(other.stderr)
        assert "the cache has no complete copy" in last_line(other.stderr)
    assert unsent.returncode == 2
    assert "the export is in unsent, but was not uploaded" in last_line(unsent.stderr)
    assert "the Hub cannot be reached ([Errno" in last_line(unsent.stderr)


@pytest.mark.slow
def test_a_run_keeps_to_the_commits_that_it_was_made_from(trained: Hub, tmp_path: Path, qwen3_folder: Path) -> None:
    home, names = trained.home.parent, ("Qwen/Qwen3-0.6B", "openai/gsm8k")
    revisions = json.loads((home / "run/checkpoints/step-000001/state.json").read_text())["revisions"]
    model, data = revisions["model Qwen/Qwen3-0.6B"], revisions["data openai/gsm8k"]
    newer = shutil.copytree(qwen3_folder, tmp_path / "newer")
    (newer / "NOTES.md").write_text("Other weights.")
    assert trained.add_model("Qwen/Qwen3-0.6B", newer) != model
    trained.requests.clear()
    for ran in trained.several(
        ["generate", "run", "What is 2+2?", "--max-tokens", "2"],
        ["eval", "run"],
        ["replay", "run", "--step", "1"],
        ["train", RECIPE, *SMALL, "output_dir=run", "--resume"],
        ["export", "run", "--format", "peft", "--to", "exported"],
    ):
        untrained = ran.args[0] == "train"  # the toy answers no question of GSM8K
        assert ran.returncode == int(untrained), ran.stderr
    asked = [request.line for name in names for request in trained.asked(f"/api/.*{name}/revision/")]
    assert len({line for line in asked if line.endswith((model, data))}) == 2
    assert all(line.endswith((model, data)) for line in asked)
    assert json.loads((home / "exported/adapter_config.json").read_text())["revision"] == model
    card = (home / "exported/README.md").read_text()
    assert f"revision: {data}" in card
    for said in ("license: apache-2.0", "base_model: Qwen/Qwen3-0.6B", "datasets:\n- openai/gsm8k"):
        assert said in card.split("---")[1]


def test_an_export_is_pushed_or_it_is_said_why_not(trained: Hub) -> None:
    sent, *unsent = trained.several(
        [f"HF_TOKEN={WRITER}", *push("sent")],
        push("unsent0"),
        ["HF_TOKEN=hf_old", *push("unsent1")],
        [f"HF_TOKEN={READER}", *push("unsent2")],
        HF_HUB_DISABLE_XET="1",  # the Hub's other protocol for large files
    )
    assert sent.returncode == 0, sent.stderr
    assert sent.stdout.splitlines()[-1] == f"{trained.endpoint}/writer/mine"
    mine, folder = trained.repositories["models", "writer/mine"], trained.home.parent / "sent"
    assert mine.commits[mine.names["main"]] == {path.name: path.read_bytes() for path in folder.iterdir()}
    said = ["the token is missing or wrong (`hf auth login`, or HF_TOKEN)"] * 2
    said.append("this token has no write access: You don't have the rights to create a model under this namespace")
    for number, (ran, words) in enumerate(zip(unsent, said, strict=True)):
        assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
        assert f"`hf upload writer/mine unsent{number}` uploads it later" in ran.stderr
        assert ran.stderr.strip().endswith(f"--push-to-hub writer/mine: {words}")


@pytest.mark.slow
def test_an_export_goes_by_xet_where_that_is_installed(trained: Hub) -> None:
    pytest.importorskip("hf_xet")
    trained.requests.clear()
    ran = trained.grpo(*push("by-xet", "writer/new"), HF_TOKEN=WRITER)
    assert ran.returncode == 0, ran.stderr
    assert trained.asked("GET /api/models/writer/new/xet-write-token")
    assert not trained.asked("PUT /lfs/")
    new = trained.repositories["models", "writer/new"]
    assert set(new.commits[new.names["main"]]) == {"README.md", "adapter_config.json", "adapters.safetensors"}


def refused_models(hub: Hub, qwen3_folder: Path, tmp_path: Path) -> dict[str, str]:
    """Models that cannot be had, and what is said of each."""

    def add(name: str, change: Callable[[Path], object]) -> None:
        folder = shutil.copytree(qwen3_folder, tmp_path / name)
        change(folder)
        hub.add_model(f"t/{name}", folder)

    def without(pattern: str) -> Callable[[Path], object]:
        return lambda folder: [path.unlink() for path in list(folder.glob(pattern))]

    def renamed(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba9000"}))

    add("bin", lambda folder: [path.rename(path.with_suffix(".bin")) for path in folder.glob("*.safetensors")])
    add("untokenized", without("tokenizer*"))
    add("unconfigured", without("config.json"))
    add("sharded", without("model-00002*"))
    add("unknown", renamed)
    hub.add_model("t/slow", qwen3_folder)
    hub.failures.append(Failure("/api/models/t/slow", delay=2))
    hub.failures.append(Failure("/api/models/t/portal", status=200))  # with a page of its own
    hub.add_model("t/gated", qwen3_folder, gated=True)
    return {
        "t/absent": "there is no model with this name; a private model needs a token with read access (`hf auth login`",
        "absent": "there is no model with this name",
        "t/gated": f"it is gated: accept its terms at {hub.endpoint}/t/gated, then log in (`hf auth login`",
        "t/bin": "no model*.safetensors in",
        "t/untokenized": "no tokenizer (tokenizer.json, ",
        "t/unconfigured": "no config.json in",
        "t/sharded": "Missing 12 parameters: model.layers.1",
        "t/unknown": "Model type mamba9000 not supported",
        "t/portal": "the server that answered is not a Hub",
        "t/slow": "no answer within 1 s (HF_HUB_DOWNLOAD_TIMEOUT=6 waits longer)",
    }


def test_a_model_that_cannot_be_had_is_said_in_a_line(hub: Hub, qwen3_folder: Path, tmp_path: Path) -> None:
    said = refused_models(hub, qwen3_folder, tmp_path)
    tokens = [f"HF_TOKEN={token}" for token in (STRANGER, "hf_old", READER, "hf_old")]
    gated = [[token, *generate("t/gated")] for token in tokens]
    ran = hub.several(*map(generate, said), *gated, HF_HUB_DOWNLOAD_TIMEOUT="1")
    for (name, words), one in zip(said.items(), ran[: len(said)], strict=True):
        assert one.returncode == 2, one.stderr
        assert "Traceback" not in one.stderr
        assert last_line(one.stderr).startswith(f"grpo: model {name}: ")
        assert words in last_line(one.stderr)
    stranger, wrong, known, cached = ran[len(said) :]
    assert f"this token's account has no access: request access at {hub.endpoint}/t/gated" in last_line(stranger.stderr)
    assert "the Hub refused the token: it is wrong or has expired (`hf auth login`" in last_line(wrong.stderr)
    assert (known.returncode, cached.returncode) == (0, 0), known.stderr
    assert "model t/gated: using the copy in the cache: the Hub refused the token" in cached.stderr


@pytest.mark.slow
def test_data_is_what_the_recipe_names_or_it_is_said_in_a_line(
    hub: Hub, toy_folder: Path, gsm8k_folder: Path, tmp_path: Path
) -> None:
    hub.add_dataset("t/gated", gsm8k_folder, gated=True)
    hub.add_dataset("t/other", gsm8k_folder)
    damaged = shutil.copytree(gsm8k_folder, tmp_path / "damaged")
    (damaged / "main/train-00000-of-00001.parquet").write_bytes(b"PAR1 and nothing else")
    hub.add_dataset("t/damaged", damaged)
    named = shutil.copytree(gsm8k_folder, tmp_path / "named")
    for split in ("train", "test"):
        rows = pa.table({"problem": ["What is 1+1?"] * 3, "answer": ["2"] * 3})
        pq.write_table(rows, named / f"main/{split}-00000-of-00001.parquet")
    hub.add_dataset("openai/gsm8k", named, revision="v2")
    cases = {
        "data.source=t/absent": "there is no dataset of that name",
        "data.source=t/gated": f"accept its terms at {hub.endpoint}/datasets/t/gated, then log in",
        "data.source=t/damaged": "data t/damaged: Parquet magic bytes not found",
        "data.config=null": None,  # `main`, because it is one of several
        "data.config=algebra": "BuilderConfig 'algebra' not found. Available: ['main', 'socratic']",
        "data.split=validation": """Unknown split "validation". Should be one of ['train', 'test'].""",
        "data.revision=v9": "it has no branch, tag or commit 'v9'",
        "data.revision=v2": "no column 'question'",
        "data.revision=v2 data.prompt={problem}": None,
        "eval.source=t/other": None,
        "eval.source=t/other eval.config=socratic": None,
    }
    ran = hub.several(*([*DRY, f"model.name={toy_folder}", *case.split()] for case in cases))
    for (case, words), one in zip(cases.items(), ran, strict=True):
        assert "Traceback" not in one.stderr, case
        assert one.returncode == (2 if words else 0), (case, one.stderr)
        assert words is None or words in last_line(one.stderr)
        assert words is None or last_line(one.stderr).startswith("grpo: data")
    assert hub.asked("/datasets/t/other/.*socratic/test")


@pytest.mark.slow
def test_a_download_that_is_cut_off_goes_on_where_it_was(hub: Hub, toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    noise = np.random.default_rng(0).bytes(12_000_000)
    rows = {"question": ["What is 1+1?"] * 4, "answer": ["2"] * 4, "noise": [noise[i::4] for i in range(4)]}
    pq.write_table(pa.table(rows), tmp_path / "large/train.parquet")
    hub.add_dataset("t/large", tmp_path / "large")
    hub.failures.append(Failure("GET /cdn/", cut_after=11_000_000, times=1))
    ran = hub.grpo(*DRY, f"model.name={toy_folder}", "data.source=t/large", "data.config=null", "eval=null")
    assert ran.returncode == 0, ran.stderr
    first, second = [request.range for request in hub.asked("GET /cdn/")]
    assert (first, second) == (None, "bytes=10485760-")  # it is written by 10 MiB


@pytest.mark.slow
def test_what_is_cut_off_again_and_again_never_becomes_a_model(hub: Hub) -> None:
    hub.failures.append(Failure("GET /cdn/", cut_after=5_000))
    broken = hub.grpo(*generate())
    assert broken.returncode == 2
    assert "the connection broke several times" in last_line(broken.stderr)
    hub.failures.clear()
    whole = hub.grpo(*generate())
    assert whole.returncode == 0, whole.stderr


@pytest.mark.slow
def test_a_hub_that_is_busy_is_asked_again(hub: Hub, toy_folder: Path) -> None:
    for request in ("/api/models", "HEAD ", "GET /cdn/"):
        hub.forget()
        hub.failures[:] = [Failure(request, status=503, times=1), Failure(request, status=429, times=1)]
        ran = hub.grpo(*generate())
        assert ran.returncode == 0, ran.stderr
    hub.forget()
    for status, words in ((503, "the Hub has an internal error (503): try again later"), (429, "too many requests")):
        hub.failures[:] = [Failure(".", status=status)]
        for ran in hub.several(generate(), [*DRY, f"model.name={toy_folder}"]):
            assert ran.returncode == 2
            assert "the Hub is busy" in ran.stderr
            assert words in last_line(ran.stderr)


@pytest.mark.slow
def test_without_a_network_it_is_said_at_once(hub: Hub, toy_folder: Path) -> None:
    local = [*DRY, f"model.name={toy_folder}"]
    hub.stop()
    for more, words in (({}, "the Hub cannot be reached ([Errno"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")):
        for ran, what in zip(
            hub.several(DRY, local, **more), ("model Qwen/Qwen3-0.6B", "data openai/gsm8k"), strict=True
        ):
            assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
            assert ran.stderr.startswith(f"grpo: {what}: cannot be downloaded from {hub.endpoint}: {words}")
            assert "the first download needs a network; a local path does not" in ran.stderr
    hub.start()


@pytest.mark.slow
def test_offline_nobody_is_asked(trained: Hub) -> None:
    trained.requests.clear()
    ran = trained.grpo(*DRY, HF_HUB_OFFLINE="1")
    assert (ran.returncode, trained.requests) == (0, []), ran.stderr
    assert "cache" not in ran.stderr, "they know"


def test_both_places_of_a_chat_template_and_all_stop_tokens_count(hub: Hub, toy_folder: Path, tmp_path: Path) -> None:
    hub.add_model("t/jinja", sharded_model(toy_folder, tmp_path / "jinja", jinja=True))
    said = ("--data", "openai/gsm8k", "--prompt", "{question}", "--prompts", "2", "--samples", "1", "data.config=main")
    measured = ["eval", "t/jinja", *said, "rollout.max_completion_length=4"]
    ran = hub.several(generate(), generate("t/jinja"), measured)
    assert [one.returncode for one in ran] == [0, 0, 0], ran
    assert "held-out accuracy by math_answer, n=2" in ran[-1].stdout
    folders = sorted(path.parent for path in hub.home.glob("hub/models--*/snapshots/*/config.json"))
    tokenizers = [load(ModelConfig(name=str(folder)))[1] for folder in folders]
    assert (folders[1] / "chat_template.jinja").is_file()
    rows = {"prompt": "What is 2+2?"}
    prompts = [PromptRenderer(DataConfig(source="x"), tokenizer).task(0, rows) for tokenizer in tokenizers]
    assert prompts[0] is not None
    assert prompts[0].prompt_ids == prompts[1].prompt_ids
    assert "<|im_start|>user" in tokenizers[0].decode(prompts[0].prompt_ids)
    stops = json.loads((folders[0] / "generation_config.json").read_text())["eos_token_id"]
    assert all(tokenizer.eos_token_ids == set(stops) for tokenizer in tokenizers)
