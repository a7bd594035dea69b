"""An update whose gradient is exactly zero: no weight moves, no moment changes, and it is counted and told."""

import io
import signal
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map
from rich.console import Console
from runs.driver import run, same_end, timeless
from training.sections import make_minibatches, updater, with_advantages, with_reference
from training.test_skips import broken
from training.test_update import groups, recipe

from grpo.backend.ranks import Ranks
from grpo.errors import RunError
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare
from grpo.runs.signals import Stopped
from grpo.scoring.scorer import Scorer
from grpo.telemetry.console import ConsoleLogger
from grpo.telemetry.recorded import read_run
from grpo.telemetry.report import report
from grpo.training.update import Updater


def minibatches(policy, cfg, uniform=(0, 1, 2), truncated: bool = False) -> list:
    """The toy groups' minibatches; rewards of the groups in `uniform` are all equal."""
    made = []
    for number, group in enumerate(groups(policy)):
        rollouts = [replace(r, scores={"r": 1.0}) if number in uniform else r for r in group.rollouts]
        if truncated:
            rollouts = [replace(r, trajectory=replace(r.trajectory, finish_reason="length")) for r in rollouts]
        made.append(replace(group, rollouts=tuple(rollouts)))
    return make_minibatches(with_advantages(made, cfg), cfg)


def everything(update: Updater) -> dict[str, mx.array]:
    """All that an update may change, but for the learning rate."""
    state = dict(tree_flatten({"weights": update.policy.adapters.state(), "optimizer": update.optimizer.state}))
    return {path: array for path, array in state.items() if not path.endswith("learning_rate")}


def same(before: dict[str, mx.array], after: dict[str, mx.array]) -> bool:
    return all(mx.array_equal(array, before[path]) for path, array in after.items())


OPTIMIZERS = {
    "adamw": {"weight_decay": 0.1},
    "sgd": {"optimizer_args": {"momentum": 0.9}, "weight_decay": 0.1},
    "lion": {"weight_decay": 0.1},
    "muon": {},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_neither_momentum_nor_weight_decay_moves_a_weight(make_policy, optimizer: str) -> None:
    policy = make_policy().policy
    cfg = recipe(optim={"steps": 9, "learning_rate": 0.01, "optimizer": optimizer, **OPTIMIZERS[optimizer]})
    update = updater(policy, cfg)
    start = everything(update)
    assert update(minibatches(policy, cfg, uniform=()), 1).without_signal == 0
    before = everything(update)
    assert not same(start, before)  # there is momentum now
    for step in (2, 3):
        measured = update(minibatches(policy, cfg), step)
        assert (measured.loss, measured.grad_norm, measured.without_signal, measured.skipped) == (0, 0, 1, 0)
        assert same(before, everything(update))
        assert update.steps_without_signal == step - 1
    assert update(minibatches(policy, cfg, uniform=()), 4).without_signal == 0
    assert not same(before, everything(update))
    assert update.steps_without_signal == 2


def pull(logprobs, batch, cfg):
    """A loss of one's own that never looks at advantages."""
    return logprobs * batch.trained


@pytest.mark.parametrize(
    ("loss", "custom"),
    [({"beta": 0.1}, None), ({"entropy_coef": 0.1}, None), ({"use": "mine.py:pull"}, pull)],
    ids=["kl", "entropy", "custom"],
)
def test_what_has_a_gradient_without_advantages_is_a_signal(make_policy, loss: dict, custom) -> None:
    policy, cfg = make_policy().policy, recipe(loss=loss)
    update = updater(policy, cfg, custom)
    before = everything(update)
    batches = [with_reference(part, policy, cfg) for part in minibatches(policy, cfg)]
    assert update(batches, 1).without_signal == 0
    assert not same(before, everything(update))


@pytest.mark.parametrize("loss", [{"top_entropy_quantile": 0.5}, {"type": "bnpo"}])
def test_rows_that_went_through_the_model_for_nothing_are_no_signal(make_policy, loss: dict) -> None:
    policy, cfg = make_policy().policy, recipe(loss=loss)
    made = minibatches(policy, cfg)
    assert made[0]  # their rows were kept: they have a say in the denominators
    assert updater(policy, cfg)(made, 1).without_signal == 1


def test_truncated_completions_alone_are_no_signal(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(loss={"mask_truncated_completions": True})
    update = updater(policy, cfg)
    before = everything(update)
    assert update(minibatches(policy, cfg, uniform=(), truncated=True), 1).without_signal == 1
    assert same(before, everything(update))


@pytest.mark.parametrize(("uniform", "silent"), [((), 0), ((1,), 1), ((0, 2), 2), ((0, 1, 2), 3)])
def test_a_step_counts_if_none_of_its_updates_had_a_signal(make_policy, uniform: tuple, silent: int) -> None:
    policy = make_policy().policy
    cfg = recipe(optim={"num_minibatches": 3, "num_iterations": 2}, rollout={"prompts_per_step": 3})
    update, calls = updater(policy, cfg), []
    apply = update.optimizer.update
    update.optimizer.update = lambda *args: calls.append(apply(*args))
    assert update(minibatches(policy, cfg, uniform), 1).without_signal == 2 * silent
    assert len(calls) == 6 - 2 * silent
    assert update.steps_without_signal == (silent == 3)


def test_a_gradient_too_small_for_its_norm_is_a_signal(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe()
    (batches,) = minibatches(policy, cfg, uniform=())
    tiny = [replace(batch, weights=batch.weights * 1e-25) for batch in batches]
    measured = updater(policy, cfg)([tiny], 1)
    assert (measured.grad_norm, measured.without_signal) == (0, 0)  # float32 squares underflow


def test_the_signal_of_another_process_is_everyones(make_policy) -> None:
    class Other(Ranks):
        """As if another process had the only rows that teach."""

        def sum(self, tree):
            return tree_map(lambda array: array + 1e-3, tree)

    policy, cfg = make_policy().policy, recipe()
    update = updater(policy, cfg, ranks=Other())
    before = everything(update)
    assert update([[]], 1).without_signal == 0
    assert not same(before, everything(update))


def test_steps_without_a_signal_do_not_hide_updates_that_are_not_finite(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(optim={"max_skipped_updates": 2})
    update = updater(policy, cfg)
    (batches,) = minibatches(policy, cfg, uniform=())
    assert update([broken(batches)], 1).without_signal == 0
    assert update([[]], 2).without_signal == 1
    with pytest.raises(RunError, match="updates in a row: 2"):
        update([broken(batches)], 3)
    assert update.steps_without_signal == 1


def test_a_reward_that_fails_on_everything_teaches_nothing(recipe) -> None:
    trainer = prepare(load_recipe(recipe, ["optim.weight_decay=0.1", "optim.steps=4"])).trainer
    trainer.step(1)
    before = everything(trainer.update)

    def broken_reward(**_):
        raise ValueError("no")

    trainer.scorer = Scorer({"digits": broken_reward}, max_failure_rates={"digits": 1.0})
    metrics = [trainer.step(n) for n in (2, 3)]
    assert [m.values["steps_without_signal"] for m in metrics] == [1, 2]
    assert [m.values["updates_without_signal"] for m in metrics] == [1, 1]
    assert metrics[0].values["rewards/digits/error_rate"] == 1
    assert same(before, everything(trainer.update))
    text = io.StringIO()
    with ConsoleLogger(Console(file=text, width=200), 4) as logger:
        logger.log(metrics[0])
    assert "no signal, weights unchanged" in text.getvalue()


@pytest.mark.slow
def test_a_run_with_steps_without_a_signal_is_resumed_to_the_bit(recipe) -> None:
    """Steps 2 to 4 teach nothing; the run is stopped among them."""
    (recipe.parent / "digits.py").write_text(
        "def reward(completions, trainer_state, **_):\n"
        "    silent = 1 <= trainer_state.global_step <= 3\n"
        "    return [1.0 if silent else sum(map(ord, text)) % 8 / 8 for text in completions]\n"
    )
    settings = ["optim.steps=6", "optim.weight_decay=0.1", "checkpoint.every=3"]
    run(recipe, "output_dir=whole", *settings)
    run(recipe, "output_dir=parts", *settings, change=lambda trainer, stop: stopping(trainer, stop, 3))
    run(recipe, "output_dir=parts", *settings, resume=True)
    same_end(Path("whole"), Path("parts"))
    lines = timeless(Path("whole/metrics.jsonl"))
    assert [line["steps_without_signal"] for line in lines] == [0, 1, 2, 3, 3, 3]
    assert len({line["adapter_delta"] for line in lines[:4]}) == 1
    assert len({line["adapter_delta"] for line in lines}) == 3
    assert "6 of 6, finished, 3 without a signal" in report([read_run(Path("whole"))])


def stopping(trainer, stop, after: int) -> None:
    """Have a signal come after a step."""
    take = trainer.step

    def step(n: int):
        if n == after + 1:
            stop.signal = signal.SIGTERM
            raise Stopped
        return take(n)

    trainer.step = step
