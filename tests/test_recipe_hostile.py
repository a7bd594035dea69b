"""Recipes that are hostile or broken: each is answered at once, in a message with file, line and key."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from test_recipe import GOOD

from grpo.errors import UserError
from grpo.plugins import bundled
from grpo.recipes import load_recipe


def message(folder: Path, text: str | bytes, *overrides: str) -> str:
    """What is said about a recipe that cannot be read."""
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    said = str(error.value).replace(str(folder), "")
    assert len(said) < 5_000
    return said


def aliases(levels: int) -> str:
    """A few lines that hold 10 ** levels texts."""
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def merges(levels: int) -> str:
    """Mappings each of which merges the one before ten times."""
    lines = ["x0: &x0 {a: 1, b: 2}"]
    lines += [f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 10)}]}}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + aliases(5), "/mine.yaml:11: more than 20,000 keys and values, counting what aliases repeat"),
        (GOOD + merges(5), "/mine.yaml:11: more than 20,000 keys and values"),
        (GOOD + f"x: &x {'a' * 300_000}\ny: [{', '.join(['*x'] * 100)}]\n", "/mine.yaml:8: more than 20,000 keys"),
        (GOOD + "a: &a [*a]\n", "/mine.yaml:7: this alias is inside the value that it repeats"),
        (GOOD + "a: &a {b: {c: *a}}\n", "/mine.yaml:7: this alias is inside"),
        (GOOD + f"a: {'[' * 400}{']' * 400}\n", "/mine.yaml:7: nested more than 32 deep"),
        (GOOD + f"a: {'{a: ' * 400}1{'}' * 400}\n", "/mine.yaml:7: nested more than 32 deep"),
        (GOOD + "#" * 10_000_000, "/mine.yaml: larger than 1,000,000 bytes: not a recipe"),
        ("seed: !!bool foo\n" + GOOD, "/mine.yaml:1: 'foo' is not of type bool"),
        ("seed: !!int ''\n" + GOOD, "/mine.yaml:1: '' is not of type int"),
        ("seed: !!float ''\n" + GOOD, "/mine.yaml:1: '' is not of type float"),
        ("seed: !!int 1_\n" + GOOD.replace("steps: 10", "steps: !!int x"), "/mine.yaml:7: 'x' is not of type int"),
        ("seed: !!timestamp foo\n" + GOOD, "/mine.yaml:1: a recipe cannot contain !!timestamp"),
        ("seed: !!binary Zm9v\n" + GOOD, "a recipe cannot contain !!binary"),
        ("seed: !!set {a, b}\n" + GOOD, "a recipe cannot contain !!set"),
        (
            "seed: !!python/object/apply:os.getcwd []\n" + GOOD,
            "a recipe cannot contain !!python/object/apply:os.getcwd",
        ),
        (
            f"seed: {'7' * 6_000}\n" + GOOD,
            "/mine.yaml:1: '7777777777777777777777777777777777777777' is not of type int",
        ),
        (f"seed: {'7' * 4_000}\n" + GOOD, "/mine.yaml:1: seed: expected less than 18446744073709551616, got 77777"),
        (
            GOOD.replace("10", "1e12"),
            "/mine.yaml:6: optim.steps: expected a valid integer, got 1000000000000.0. It should be less than 1000000.",
        ),
        (GOOD.replace("10", "1e23"), "/mine.yaml:6: optim.steps: expected a valid integer, got 1e+23"),
        (GOOD.replace("10", "1000000000000"), "/mine.yaml:6: optim.steps: expected less than 1000000, got 10000000"),
        (GOOD.replace("1e-5", "1e400"), "/mine.yaml:6: optim.learning_rate: expected a finite number"),
        (
            f"output_dir: {'a' * 5_000}\n" + GOOD,
            "/mine.yaml:1: output_dir: expected a name that a file can have (at most 900 bytes",
        ),
        (
            f"output_dir: {'a/' * 500}\n" + GOOD,
            "/mine.yaml:1: output_dir: expected a name that a file can have (at most 900 bytes",
        ),
        ('output_dir: "a\\0b"\n' + GOOD, "/mine.yaml:1: a text contains a NUL character"),
        ('output_dir: "\\ud800"\n' + GOOD, "/mine.yaml:1: a text contains half of a surrogate pair"),
        ('"\\ud800": 1\n' + GOOD, "/mine.yaml:1: a text contains half of a surrogate pair"),
        (GOOD.encode() + b"\nx: \xff\n", "/mine.yaml:8: not a text file in UTF-8"),
        (GOOD + "x: \x07\n", "/mine.yaml:7: not YAML: it contains the character U+0007"),
        (GOOD + "? [a, b]\n: c\n", "/mine.yaml:7: the key a list or mapping is not text"),
        (GOOD + "1: c\n", "/mine.yaml:7: the key '1' is not text"),
        (GOOD + "---\nb: c\n", "/mine.yaml:7: not YAML: but found another document"),
        (GOOD + "<<: 3\n", "/mine.yaml:7: not YAML: expected a mapping or list of mappings for merging"),
        (GOOD + "\n".join(f"k{n}: {n}" for n in range(9_000)), "and 8,980 more mistakes"),
        (GOOD + f"{'k' * 900}: 1\n", "/mine.yaml:7: unknown key kkkkk"),
    ],
    ids=range(35),
)
def test_it_is_answered_with_its_place(tmp_path: Path, text: str | bytes, said: str) -> None:
    begun = time.process_time()
    assert said in message(tmp_path, text)
    assert time.process_time() - begun < 5  # what has no bounds takes minutes, or all memory


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rewards.-1.weight=1", "there is no rewards.-1.weight in the recipe: the list has only the item 0"),
        ("rewards.1.weight=1", "there is no rewards.1.weight in the recipe: the list has only the item 0"),
        (f"rewards.{'9' * 5_000}.weight=1", "the list has only the item 0"),
        ("rewards.99999999999999999999.weight=1", "the list has only the item 0"),
        ("rewards.use=x", "there is no rewards.use in the recipe: the list has only the item 0"),
        ("loss..beta=1", "a part of the key loss..beta is empty"),
        (".loss=1", "a part of the key .loss is empty"),
        ("loss.=1", "a part of the key loss. is empty"),
        ("loss.0=1", "unknown key loss.0"),
        ("model.name.x=1", "there is no model.name.x in the recipe: the key above it is not a section"),
        (".".join(["a"] * 100) + "=1", "the key has more than 32 parts"),
        ("seed=!!int x", "command line: seed=!!int x: seed: 'x' is not of type int"),
        (f"seed={'7' * 6_000}", "seed: '7777777777777777777777777777777777777777' is not of type int"),
        (f"rollout.stop={'[' * 400}", "rollout.stop: nested more than 32 deep"),
        (f"rollout.stop={'[' * 20}", "rollout.stop: expected a list"),
        ("seed=&a [*a]", "seed: this alias is inside the value that it repeats"),
        ("output_dir=a\0b", "output_dir: a text contains a NUL character"),
        ("output_dir=a\ud800", "output_dir: a text contains half of a surrogate pair"),
        (f"output_dir={'a' * 2_000_000}", "output_dir: more than 1,000,000 characters"),
    ],
    ids=range(19),
)
def test_an_override_is_answered_with_its_key(tmp_path: Path, override: str, said: str) -> None:
    found = message(tmp_path, GOOD, override)
    assert said in found
    assert found.startswith("command line: ")


def test_a_text_may_look_like_what_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD + "eval: {split: 2026-11-29}\n")
    recipe = load_recipe(tmp_path / "mine.yaml", ["data.prompt=!!int {x}", "data.system=[[[", "data.config=2001-99-99"])
    assert (recipe.data.prompt, recipe.data.system, recipe.data.config) == ("!!int {x}", "[[[", "2001-99-99")
    assert recipe.eval is not None
    assert recipe.eval.split == "2026-11-29"


def test_merged_keys_are_read_and_known_by_their_line(tmp_path: Path) -> None:
    base = "optim: &base\n  steps: 10\n  learning_rate: 1e-5\n"
    text = GOOD.partition("optim")[0] + base + "eval:\n  <<: {every: x}\n"
    assert "/mine.yaml:10: eval.every: expected a valid integer" in message(tmp_path, text)
    (tmp_path / "mine.yaml").write_text(text.replace("every: x", "every: 7"))
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.eval is not None
    assert recipe.eval.every == 7


# A mutation fuzzer over the shipped recipes.

SHIPPED = [path.read_text(encoding="utf-8") for path in sorted(bundled("recipes").rglob("*.yaml"))]
PIECES = [
    *("&a ", "*a", "<<: ", "!!int ", "!!bool ", "!!timestamp ", "!!null ", "!!set ", "!x ", "[", "]", "{", "}", "? "),
    *(": ", "- ", "\n", "  ", "\t", "#", "'", '"', "|", ">", "%", "@", "`", "---\n", "...\n", "\x00", "\ud800"),
    *('"\\ud800"', '"\\0"', "1e12", "1e23", "1e400", "-1", "0", "9" * 5_000, ".nan", ".inf", "-.inf", "0x", "190:20"),
    *("null", "true", "[]", "{}", "''", "a" * 5_000, "[" * 200, "{a: " * 200, "&a [*a]", "{<<: *a}", "2026-13-45"),
]  # fmt: skip


def mutant(random_: random.Random) -> str:
    """A shipped recipe with a few places changed: a piece put in, something cut out, lines moved or spliced."""
    text = random_.choice(SHIPPED)
    for _ in range(random_.randint(1, 4)):
        here, there = sorted(random_.randint(0, len(text)) for _ in range(2))
        lines = text.splitlines(keepends=True)
        match random_.randrange(6):
            case 0:
                text = text[:here] + random_.choice(PIECES) + text[here:]
            case 1:
                text = text[:here] + text[min(there, here + random_.randint(1, 30)) :]
            case 2:  # the value of a line
                number = random_.randrange(len(lines)) if lines else 0
                key, colon, _ = lines[number].partition(":") if lines else ("", "", "")
                text = "".join([*lines[:number], f"{key}{colon} {random_.choice(PIECES)}\n", *lines[number + 1 :]])
            case 3:
                random_.shuffle(lines)
                text = "".join(lines[: random_.randint(1, 60)])
            case 4:
                text = "".join(lines[: random_.randint(0, len(lines))]) + random_.choice(SHIPPED)[here:]
            case 5:
                text = text[:here] + chr(random_.randrange(0x250)) + text[here + 1 :]
    return text


def read_mutants(folder: Path, count: int, seed: int) -> tuple[int, float]:
    """How many of the mutants are recipes all the same, and the most seconds that one took."""
    random_, path = random.Random(seed), folder / "mutant.yaml"
    good, slowest, placeless = 0, 0.0, []
    for _ in range(count):
        path.write_bytes(mutant(random_).encode("utf-8", "surrogatepass"))
        begun = time.process_time()
        try:
            load_recipe(path)
            good += 1
        except UserError as error:
            placeless += [str(error)] if str(path) not in str(error) else []
        slowest = max(slowest, time.process_time() - begun)
    assert placeless == []
    return good, slowest


def test_mutants_of_the_shipped_recipes_are_read_or_explained(tmp_path: Path) -> None:
    good, slowest = read_mutants(tmp_path, 300, seed=0)
    assert 0 < good < 300
    assert slowest < 5


@pytest.mark.slow
def test_ten_thousand_mutants_are_read_or_explained(tmp_path: Path) -> None:
    good, slowest = read_mutants(tmp_path, 10_000, seed=1)
    assert 0 < good < 10_000
    assert slowest < 5
