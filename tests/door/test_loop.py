"""A loop of one's own computes what the trainer computes, and says what it cannot do."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import grpo
from grpo.backend.random import derive_key
from grpo.runs.prepare import prepare

SHORT = {"prompts_per_step": 3, "num_generations": 4, "max_completion_length": 8, "eval": None, "shuffle": True}


def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


@pytest.mark.parametrize("loss", [{"type": "dapo"}, {"type": "grpo", "beta": 0.1}, {"type": "dr_grpo"}])
def test_a_step_is_the_trainers_to_the_bit(student: str, loss: dict) -> None:
    cfg = grpo.recipe("quickstart", steps=2, loss=loss, micro_batch_tokens=64, **SHORT)
    cfg = grpo.Trainer(cfg, rewards=[digits]).recipe
    given = grpo.Trainer(cfg, rewards=[digits])._given
    trainer = prepare(cfg, given).trainer
    policy = grpo.load(student, rank=8, scale=4.0)
    tasks = grpo.tasks("builtin:arithmetic", prompt="{question}", n=3)
    opt = grpo.optimizer("adamw", learning_rate=5e-4)
    own = grpo.Loss(**loss)
    for step in (1, 2):
        made = trainer.step(step)
        groups = policy.sample(next(tasks), n=4, max_tokens=8, key=derive_key(0, "rollout", step, 0))
        groups = grpo.advantages(grpo.score(groups, [digits]), scale_rewards=own.preset.scale_rewards)
        assert [r.advantage for g in groups for r in g.rollouts] == [
            r.advantage for g in made.groups for r in g.rollouts
        ]
        batches = grpo.batches(groups, own, micro_batch_tokens=64, max_completion_length=8)
        update = policy.update(batches, opt)
        assert (update.loss, update.grad_norm) == (made.values["loss"], made.values["grad_norm"])
    theirs, ours = trainer.policy.adapters.state(), policy.inner.adapters.state()
    assert any(mx.abs(array).max().item() > 0 for path, array in ours.items() if path.endswith("lora_b"))
    assert all(mx.array_equal(theirs[path], ours[path]).item() for path in theirs)


@pytest.fixture
def policy(student: str):
    return grpo.load(student, rank=4)


@pytest.fixture
def groups(policy):
    groups = policy.sample(next(grpo.tasks("builtin:arithmetic", prompt="{question}", n=2)), n=4, max_tokens=8, key=1)
    return grpo.advantages(grpo.score(groups, [lambda_digits]))


lambda_digits = grpo.reward(digits, name="digits")


def test_a_loss_of_ones_own_is_weighed_and_summed(policy, groups) -> None:
    def mine(current, batch, cfg):
        return -batch.advantages * mx.exp(current - batch.anchor)

    batches = grpo.batches(groups, micro_batch_tokens=40)
    assert len(batches) > 1
    whole = policy.gradient(batches, mine)
    parts = [policy.gradient(batch, mine) for batch in batches]
    assert whole.loss == pytest.approx(sum(part.loss for part in parts), rel=1e-6)
    by_hand = -sum((batch.weights * batch.advantages).sum().item() for batch in batches)  # the ratio is 1
    assert whole.loss == pytest.approx(by_hand, rel=1e-5)
    for path, array in whole.arrays.items():
        np.testing.assert_allclose(array, sum(part.arrays[path] for part in parts), atol=1e-6)
    before = policy.inner.adapters.state()
    opt = grpo.optimizer("sgd", learning_rate=0.5, max_grad_norm=1e6)
    expected = {path: before[path] - 0.5 * array for path, array in whole.arrays.items()}
    opt.update(policy, whole)
    after = dict(tree_flatten(policy.model.trainable_parameters()))
    for path, array in expected.items():
        np.testing.assert_allclose(after[path], array, atol=1e-6)


def test_an_optimizers_state_goes_on_whatever_makes_the_gradient(student: str, groups) -> None:
    """AdamW's second step depends on its first."""
    ends = []
    for how in ("update", "gradient"):
        policy, opt = grpo.load(student, rank=4), grpo.optimizer("adamw", learning_rate=1e-2)
        batches = grpo.batches(groups, grpo.Loss("dapo"))
        policy.update(batches, opt)
        if how == "update":
            policy.update(batches, opt)
        else:
            opt.update(policy, policy.gradient(batches, batches.loss))
        assert opt.steps_done == 2
        ends.append(policy.inner.adapters.state())
    assert all(mx.array_equal(array, ends[1][path]).item() for path, array in ends[0].items())


def test_a_schedule_goes_by_the_updates(policy, groups) -> None:
    opt = grpo.optimizer("sgd", learning_rate=1.0, lr_scheduler_type="linear", steps=4)
    rates = []
    for _ in range(4):
        policy.update(grpo.batches(groups), opt)
        rates.append(opt.learning_rate)
    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_the_same_key_draws_the_same_and_another_does_not(policy) -> None:
    def drawn(key) -> list:
        return [
            r.trajectory.token_ids for r in policy.sample(["What is 1+2+3+4?"], n=6, max_tokens=8, key=key)[0].rollouts
        ]

    assert drawn(3) == drawn(3) != drawn(4)


def test_prompts_may_be_texts_and_messages(policy) -> None:
    text, messages = policy.sample(["Hi?", [{"role": "user", "content": "Hi?"}]], n=1, max_tokens=4, temperature=0)
    assert text.task.prompt_ids == messages.task.prompt_ids == policy.encode("Hi?")
    assert text.rollouts[0].trajectory.token_ids == messages.rollouts[0].trajectory.token_ids
    assert text.rollouts[0].trajectory.behaviour is None
    with pytest.raises(grpo.UserError, match="no logprobs: sample them at the policy's own temperature"):
        grpo.batches([text])


def test_a_penalty_is_to_the_reference(policy, groups) -> None:
    loss, opt = grpo.Loss("grpo", beta=0.5), grpo.optimizer("sgd", learning_rate=50.0)
    batches = grpo.batches(groups, loss)
    assert policy.update(batches, opt).metrics["kl"] == pytest.approx(0, abs=1e-6)
    with policy.reference():
        reference = policy.logprobs(batches[0])
    current = policy.logprobs(batches[0])
    trained = batches[0].trained
    log_ratio = (reference - current) * trained
    kl = ((mx.exp(log_ratio) - log_ratio - 1) * trained).sum() / trained.sum()
    assert policy.update(batches[:1], opt, loss).metrics["kl"] == pytest.approx(kl.item(), rel=1e-3)


def test_a_saved_adapter_is_loaded(policy, groups, student: str, run_cli, tmp_path) -> None:
    policy.update(grpo.batches(groups), grpo.optimizer("sgd", learning_rate=50.0))
    folder = policy.save(tmp_path / "mine" / "adapter")
    again = grpo.load(student, rank=4, path=str(folder))
    prompt = "What is 1+2+3+4?"
    assert all(mx.array_equal(a, again.inner.adapters.state()[p]) for p, a in policy.inner.adapters.state().items())
    (answer,) = policy.sample([prompt], n=1, max_tokens=12, temperature=0)[0].rollouts
    ran = run_cli("generate", student, prompt, "--adapter", folder, "--max-tokens", 12)
    assert ran.out.rstrip("\n") == answer.trajectory.text.rstrip("\n")


def test_a_reward_that_fails_is_no_zero(policy) -> None:
    def broken(completions, **_):
        return [None if i == 0 else float("nan") if i == 1 else 1.0 for i in range(len(completions))]

    (group,) = grpo.advantages(grpo.score(policy.sample(["Hi?"], n=4, max_tokens=4), [broken]))
    assert [r.reward for r in group.rollouts] == [None, None, 1.0, 1.0]
    assert [r.advantage for r in group.rollouts] == [0.0] * 4
    assert "broken" in group.rollouts[1].failures


def test_a_reward_of_weight_0_may_fail_as_it_likes(policy) -> None:
    def broken(completions, **_):
        raise ValueError("no score")

    (group,) = grpo.score(policy.sample(["Hi?"], n=2, max_tokens=4), [digits, grpo.reward(broken, weight=0)])
    assert all(rollout.reward == rollout.scores["digits"] for rollout in group.rollouts)
    with pytest.raises(grpo.RunError, match="'broken' failed on 2 of the last 2 completions"):
        grpo.score([group], [broken])


def test_a_system_message_comes_first(policy) -> None:
    (task,) = next(grpo.tasks([{"q": "Hi?"}], prompt="q", n=1, system="Be brief."))
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    assert task.prompt == said
    (group,) = policy.sample([task], n=1, max_tokens=2)
    assert group.task.prompt_ids == tuple(policy.tokenizer.apply_chat_template(said, add_generation_prompt=True))
    assert group.task.identity == ("data", 0)


def test_tasks_go_on_where_they_were() -> None:
    rows = [{"q": f"{i}?"} for i in range(5)]
    first, again = (grpo.tasks(rows, prompt="q", n=3, seed=2) for _ in range(2))
    next(first)
    again.load_state(first.state())
    assert next(first) == next(again)


def test_rewards_are_weighed(policy) -> None:
    ones = grpo.reward(lambda completions, **_: [1.0] * len(completions), weight=0.25, name="ones")
    only_told = grpo.reward(lambda completions, **_: [9.0] * len(completions), weight=0, name="told")
    (group,) = grpo.score(policy.sample(["Hi?"], n=2, max_tokens=4), [ones, digits, only_told])
    for rollout in group.rollouts:
        assert rollout.reward == pytest.approx(0.25 + rollout.scores["digits"])
        assert rollout.scores["told"] == 9


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: grpo.load("x", rnk=4), "grpo.load: unknown setting rnk; the settings are .*rank"),
        (lambda: grpo.load("x", rank=0), "grpo.load: adapter.rank: expected greater than 0, got 0"),
        (lambda: grpo.tasks([{"q": "?"}], prompt="q", max_prompt_length=5), "needs a tokenizer.*len"),
        (lambda: grpo.tasks([{"q": "?"}], prompt="q", n=0), "n is 0"),
        (lambda: grpo.tasks(7), "data: the object given for it is of type int; expected rows"),
        (lambda: next(grpo.tasks([{"q": "?"}], prompt="{p}")), "no column 'p' in row 0"),
        (lambda: grpo.tasks([]), "split 'train' has no rows"),
        (lambda: grpo.Loss("dappo"), "grpo.Loss: loss.type.*Did you mean 'dapo'"),
        (lambda: grpo.Loss("dapo", epsilonn=0.1), "grpo.Loss: unknown key loss.epsilonn. Did you mean loss.epsilon"),
        (lambda: grpo.Loss("rloo", delta=2.0), "loss.delta does nothing with the reinforce surrogate"),
        (lambda: grpo.optimizer("adamv"), "grpo.optimizer: optim.optimizer"),
        (lambda: grpo.optimizer(momentum=0.9), "grpo.optimizer: unknown key optim.momentum"),
        (lambda: grpo.optimizer(warmup_steps=5), "warmup_steps needs steps="),
        (lambda: grpo.optimizer(num_minibatches=2), "num_minibatches is not a setting of an optimizer"),
        (lambda: grpo.optimizer(optimizer_args={"beta": 1}), "adamw takes no 'beta'"),
        (lambda: grpo.reward(lambda **_: []), "a lambda has no name"),
        (lambda: grpo.reward(digits, wait=1), "grpo.reward: unknown key .*wait"),
        (lambda: grpo.recipe("quickstart", stepz=3), "grpo.recipe: .*unknown key stepz"),
        (lambda: grpo.recipe("quickstart", every=3), "every is the last part of 3 keys"),
        (lambda: grpo.recipe("quickstart", steps=0), "grpo.recipe: .*optim.steps.*greater than 0"),
        (lambda: grpo.recipe("quickstart", rewards=[digits]), "a recipe holds"),
        (lambda: grpo.recipe("quikstart"), "Did you mean 'quickstart'"),
    ],
)
def test_what_will_not_do_is_said(call, said: str) -> None:
    with pytest.raises(grpo.UserError, match=said):
        call()


def test_one_optimizer_moves_one_policy(policy, groups, student: str) -> None:
    opt = grpo.optimizer("sgd")
    policy.update(grpo.batches(groups), opt)
    with pytest.raises(grpo.UserError, match="already updates another policy"):
        grpo.load(student).update(grpo.batches(groups), opt)


def test_constant_and_other_needs_are_said(policy, groups) -> None:
    with pytest.raises(grpo.UserError, match="dr_grpo divides by a constant: pass max_completion_length"):
        grpo.batches(groups, grpo.Loss("dr_grpo"))
    with pytest.raises(grpo.UserError, match="groups have 2 to 4 rollouts"):
        grpo.advantages([*groups, *policy.sample(["Hi?"], n=2, max_tokens=2)])
    with pytest.raises(grpo.UserError, match="turns: turn needs more than the sum of the rewards"):
        grpo.advantages(groups, turns="turn")
    with pytest.raises(grpo.UserError, match="gdpo needs more than the sum of the rewards"):
        grpo.advantages(groups, baseline="gdpo")
    with pytest.raises(grpo.UserError, match="pass loss="):
        policy.update(list(grpo.batches(groups)), grpo.optimizer())
    with pytest.raises(grpo.UserError, match="top_entropy_quantile needs all batches"):
        policy.gradient(grpo.batches(groups)[0], grpo.Loss(top_entropy_quantile=0.5))
    with pytest.raises(grpo.UserError, match="unknown setting top_q"):
        policy.sample(["Hi?"], top_q=3)
    with pytest.raises(grpo.UserError, match=r"two rewards have the name 'digits'"):
        grpo.score(groups, [digits, digits])
    with pytest.raises(grpo.RunError, match="loss: bad returned"):
        policy.gradient(grpo.batches(groups), bad)


def bad(current, batch, cfg):
    return current.sum()
