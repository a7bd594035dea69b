"""Updates that are not finite: skipped, counted, kept for inspection, and after too many the step is taken back."""

import math
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from training.sections import make_batches, make_minibatches, updater, with_advantages, with_anchor
from training.test_update import groups, recipe

from grpo.errors import RunError


def broken(batches):
    """The same batches with weights that make loss and gradient infinite."""
    return [replace(batch, weights=batch.weights * math.inf) for batch in batches]


def test_what_is_not_finite_is_skipped_counted_and_kept_for_inspection(make_policy, tmp_path) -> None:
    policy, cfg = make_policy().policy, recipe(optim={"max_skipped_updates": 9})
    batches = make_batches(with_advantages(groups(policy), cfg), cfg)
    before, update = policy.adapters.state(), updater(policy, cfg)
    update.inspect = tmp_path
    measured = update([broken(batches)], 3)
    assert (measured.skipped, measured.metrics) == (1, {})
    assert math.isnan(measured.loss)
    assert all(mx.array_equal(array, before[path]) for path, array in policy.adapters.state().items())
    arrays, notes = mx.load(str(tmp_path / "step-000003/batches-0.safetensors"), return_metadata=True)
    assert mx.isinf(arrays["0.weights"]).any().item()
    assert mx.array_equal(arrays["0.token_ids"], batches[0].token_ids)
    assert "lora_b" in notes["not_finite"]
    kept = mx.load(str(tmp_path / "step-000003/adapters.safetensors"))
    assert all(mx.array_equal(array, before[path]) for path, array in kept.items())
    assert update([broken(batches), batches], 4).skipped == 1  # the other one was applied
    assert any(not mx.array_equal(array, before[path]) for path, array in policy.adapters.state().items())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("[save_safetensors] Failed")])
def test_a_full_disk_does_not_end_a_run_over_a_skipped_update(
    make_policy, tmp_path, monkeypatch, caplog, error
) -> None:
    policy, cfg = make_policy().policy, recipe(optim={"max_skipped_updates": 2})
    batches = make_batches(with_advantages(groups(policy), cfg), cfg)
    update = updater(policy, cfg)
    update.inspect = tmp_path

    def full(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(mx, "save_safetensors", full)
    assert update([broken(batches)], 3).skipped == 1
    assert f"could not be written to {tmp_path}/step-000003: {error}" in caplog.text
    with pytest.raises(RunError, match=r"none of them was applied\. A lower"):
        update([broken(batches)], 4)


def test_several_skipped_updates_in_a_row_stop_the_run(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(optim={"max_skipped_updates": 3})
    batches = make_batches(with_advantages(groups(policy), cfg), cfg)
    update = updater(policy, cfg)
    for good in range(2):
        update([broken(batches)], 2 * good + 1)
        update([broken(batches)], 2 * good + 1)
        update([batches], 2 * good + 2)  # one that is applied starts the count again
    before, state = policy.adapters.state(), dict(tree_flatten(update.optimizer.state))
    update([broken(batches), broken(batches)], 5)
    with pytest.raises(RunError, match=r"step 6: .* not finite: .* updates in a row: 3"):
        update([broken(batches)], 6)
    assert all(mx.array_equal(array, before[path]) for path, array in policy.adapters.state().items())
    assert all(mx.array_equal(array, state[path]) for path, array in tree_flatten(update.optimizer.state))


def test_ratios_are_to_before_the_first_update_even_where_that_was_skipped(make_policy, monkeypatch) -> None:
    policy = make_policy().policy
    cfg = recipe(optim={"num_minibatches": 2, "num_iterations": 2, "micro_batch_tokens": 999, "learning_rate": 0.05})
    first, second = with_anchor(make_minibatches(with_advantages(groups(policy), cfg), cfg), policy, cfg)
    update, seen = updater(policy, cfg), []
    gradient, before = update.gradient, policy.group_logprobs(*prompts_of(first[0]))[0]

    def noted(batches, dropout_key=None):
        seen.append(batches[0].anchor)
        found = gradient(batches, dropout_key)
        return replace(found, loss=math.nan) if len(seen) == 1 else found

    monkeypatch.setattr(update, "gradient", noted)
    assert update([first, second], 1).skipped == 1
    assert seen[0] is None
    assert mx.allclose(seen[2] * first[0].trained, before * first[0].trained, atol=1e-6)
    after = policy.group_logprobs(*prompts_of(first[0]))[0]
    assert mx.abs((after - before) * first[0].trained).max().item() > 0.01


def prompts_of(batch):
    return batch.prompt_ids, batch.prompt_lengths, batch.prompt_index, batch.token_ids
