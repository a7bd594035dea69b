"""Recipes: what is read, and what is said about a mistake."""

from pathlib import Path

import pytest
import yaml

from grpo.document import Dumper, read_written, value_of
from grpo.errors import UserError
from grpo.plugins import bundled
from grpo.presets import PRESETS
from grpo.recipes import dump_recipe, load_recipe

GOOD = """\
model: {name: some/model}
data:
  source: some/data
rewards:
  - use: gsm8k_answer
optim: {steps: 10, learning_rate: 1e-5}
"""

BUNDLED = sorted([*bundled("recipes").glob("*.yaml"), *bundled("recipes").glob("learning/*.yaml")])


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: "-".join(path.parts[-2:]))
def test_bundled_recipes_parse_and_say_what_they_are(path: Path) -> None:
    load_recipe(path)
    assert path.read_text().startswith("# ")


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, GOOD)).optim.learning_rate == 1e-5


def test_the_folder_is_named_after_the_recipe(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, GOOD)).output_dir == "runs/mine"


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), ["eval.split=dev", "log.wandb.mode=offline", "model.revision=12e4567"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


def test_files_beside_the_recipe_are_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    (tmp_path / "mine.py").write_text("")
    text = GOOD.replace("some/data", "data.jsonl").replace("gsm8k_answer", "mine.py:score")
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.data.source == str(tmp_path / "data.jsonl")
    assert recipe.rewards[0].use == f"{tmp_path / 'mine.py'}:score"


def test_a_value_that_begins_with_a_hash_is_no_comment(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path, ["rewards.0.kwargs.pattern=####", "data.system=# Be brief", "rollout.stop=['####']"])
    assert recipe.rewards[0].kwargs == {"pattern": "####"}
    assert (recipe.data.system, recipe.rollout.stop) == ("# Be brief", ("####",))
    with pytest.raises(UserError, match=r'rollout.stop: expected a list, got "####"'):
        load_recipe(path, ["rollout.stop=####"])


def test_overrides_reach_into_sections_and_lists(tmp_path: Path) -> None:
    overrides = ["loss.beta=0.1", "rewards.0.weight=2", "rollout={num_generations: 4}", "log.wandb.project=mine"]
    recipe = load_recipe(write(tmp_path, GOOD), overrides)
    assert (recipe.loss.beta, recipe.rewards[0].weight) == (0.1, 2)
    assert (recipe.rollout.num_generations, recipe.log.wandb and recipe.log.wandb.project) == (4, "mine")


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("source:", "sorce:", 3, "unknown key data.sorce. Did you mean data.source?"),
        ("source: some/data", "source: some/data\n  beta: 1", 4, "unknown key data.beta. Did you mean loss.beta?"),
        ("steps: 10", "steps: ten", 6, 'optim.steps: expected a valid integer, got "ten"'),
        ("steps: 10", "steps: 1.5", 6, "optim.steps: expected a valid integer, got 1.5"),
        ("1e-5", '"1e-5"', 6, 'optim.learning_rate: expected a valid number, got "1e-5". Write it without quotes.'),
        ("1e-5", "-1", 6, "optim.learning_rate: expected greater than 0, got -1"),
        ("steps: 10, ", "", 6, "optim.steps is missing"),
        (
            "optim:",
            "rollout: {num_generations: 1}\noptim:",
            6,
            "rollout.num_generations: expected greater than or equal",
        ),
        ("optim:", "loss: {type: grop}\noptim:", 6, "loss.type: expected 'grpo', 'bnpo', 'dr_grpo'"),
        ("optim:", "loss: {beta: 0, beta: 1}\noptim:", 6, "loss.beta occurs twice"),
        ("optim:", "optim: [", 6, "not YAML"),
        ("gsm8k_answer", "gsm8k_answer\n    weight: 0", 4, "every reward has weight 0"),
        ("steps: 10", "steps: 10, num_minibatches: 3", 1, "rollout.prompts_per_step must be divisible"),
        ("optim:", "loss:\n  type: dapo\n  delta: 1.1\noptim:", 8, "loss.delta must be above 1 + epsilon_high"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, line: int, said: str) -> None:
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_recipe(path)
    message = str(error.value)
    assert said in message
    assert "\n" not in message
    if (
        "weight 0" not in said and "divisible" not in said and "not YAML" not in said
    ):  # said of the whole recipe, and of where YAML broke off
        assert f"{path}:{line}: " in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.bata=1", "command line: loss.bata=1: unknown key loss.bata. Did you mean loss.beta?"),
        ("loss.beta", "command line: loss.beta: the value is missing: write loss.beta=value"),
        ("rewards.3.weight=1", "there is no rewards.3.weight"),
        ("rewards=[]", "rewards: a run needs at least one reward, such as rewards: [{use: math_answer}], or an"),
        ("rewards.0=x", 'rewards.0: expected keys and values, got "x". Write {use: math_answer}'),
        ("model=some/model", 'model: expected keys and values, got "some/model". Write {name: Qwen/Qwen3-0.6B}'),
        ("log.wandb=true", "log.wandb: expected keys and values, got true. Write {project: grpo}"),
        ("rewards={use: length}", 'rewards: expected a list, got {"use": "length"}. Write a dash before each reward'),
        ("rewards.0.weigth=2", "unknown key rewards.0.weigth. Did you mean rewards.0.weight?"),
        (
            "adapter.targets=3",
            "adapter.targets: expected 'all-linear', a valid string or a list, got 3.",
        ),
        ("adapter.targets=[]", "adapter.targets: expected at least one, got []"),
        ("environment={command: python3 prog.py 'a b'}", 'Write environment.command: ["python3", "prog.py", "a b"]'),
        ("environment={command: it's odd}", """Write environment.command: ["it's", "odd"]"""),
        ("adapter.layers=3", "adapter.layers: expected 'all' or a list, got 3"),
        ("data.source=[]", "data.source: expected at least one, got []"),
        ("optim.optimizer=AdamW", "Did you mean 'adamw'?"),
        ("data.chat_template_kwargs=3", "data.chat_template_kwargs: expected keys and values, got 3."),
        ("loss.beta=x", 'command line: loss.beta: expected a valid number, got "x".\n'),
        ("memory.limit_gb=8GB", 'memory.limit_gb: expected a valid number, got "8GB".\n'),
        ("memory=8", "memory: expected keys and values, got 8. Write {limit_gb: 16}\n"),
        ("rollout.kv_bits='8'", 'rollout.kv_bits: expected 4 or 8, got "8". Write it without quotes.\n'),
        (
            "optim.gradient_checkpointing=0",
            "optim.gradient_checkpointing: expected true, false, a number greater than 0 or 'auto', got 0.\n",
        ),
        (
            "optim.gradient_checkpointing='4'",
            "expected true, false, a valid integer or 'auto', got \"4\". Write it without quotes.\n",
        ),
        ("rollout.kv_bits=8", "rollout.kv_bits makes completions differ slightly from the policy's own. Set also"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write(tmp_path, GOOD), [override])
    assert said in f"{error.value}\n"


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write(tmp_path, GOOD.replace("steps: 10", "steps: x").replace("source", "sauce")))
    assert len(str(error.value).splitlines()) == 2  # the unknown key and the wrong type


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize(
    "more", [[], ["loss.beta=0.1", "loss.beta_end=0"], ["loss.importance_sampling_correction=token_mask"]]
)
def test_every_variants_recipe_reads_back(tmp_path: Path, kind: str, more: list[str]) -> None:
    if kind == "dppo" and "loss.importance_sampling_correction=token_mask" in more:
        pytest.skip("dppo refuses the correction: its ratio is to the sampler already")
    recipe = load_recipe(write(tmp_path, GOOD), [f"loss.type={kind}", *more])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="a recipe is a mapping"):
        load_recipe(write(tmp_path, text))


class PurePython(yaml.SafeDumper):
    """What `Dumper` is without libyaml."""

    yaml_implicit_resolvers = Dumper.yaml_implicit_resolvers


def test_libyaml_writes_where_it_is() -> None:
    assert issubclass(Dumper, yaml.CSafeDumper) == yaml.__with_libyaml__


@pytest.mark.parametrize("writer", [Dumper, PurePython])
def test_any_text_is_read_back_with_libyaml_and_without(writer: type[Dumper | PurePython]) -> None:
    for text in (
        "1e-5",
        "2026-11-30",
        ".5",
        "null",
        "yes",
        "#a",
        "a: b",
        " lead",
        "a\n b\n\n c ",
        "\x85\u2028\ufeff",
        "é😀" * 60,
        "",
    ):
        written = yaml.dump({"a": [text]}, Dumper=writer, sort_keys=False)
        assert value_of(written) == read_written(written) == {"a": [text]}
