"""The meaning of each metric that a run writes. The manual's reference prints these entries.

A part in angle brackets stands for any text: `rewards/<name>/mean` is the mean of each reward.
"""

from __future__ import annotations

import re
from functools import cache

MEANINGS: dict[str, dict[str, str]] = {
    "Reward": {
        "reward": "Mean over completions of the weighted sum of the rewards, before penalties. Absent, like the next "
        "five metrics, if no completion of the step has a reward, for example in a run with a teacher alone.",
        "reward_std": "Standard deviation of the rewards within a group, averaged over groups.",
        "frac_reward_zero_std": "Fraction of groups whose completions all have the same reward. Such a group has no "
        "advantages: the policy learns nothing from it, unless there is a teacher. With `advantage.turns: turn` it "
        "can still teach: conversations with the same sum of rewards differ if their turns do.",
        "solved_all": "Fraction of groups in which every completion has reward 1 or more.",
        "solved_none": "Fraction of groups in which no completion has reward 1 or more.",
        "mixed": "Fraction of groups in which some completions have reward 1 or more and some do not.",
        "reward_penalty": "Mean amount that the KL penalty (`loss.kl_in: reward`) and the length penalty "
        "(`advantage.soft_overlong_cache`) take off the reward.",
        "rewards/<name>/mean": "Mean score of one reward function, or of an environment's own reward.",
        "rewards/<name>/std": "Standard deviation of these scores, with Bessel's correction.",
        "rewards/<name>/failures": "Number of completions on which this reward failed since the start of the run, "
        "evaluations included.",
        "rewards/<name>/none_rate": "Fraction of the step's completions to which the reward gave no score (`None`).",
        "rewards/<name>/error_rate": "Fraction of the step's completions for which the reward raised an exception or "
        "returned something other than a number.",
        "rewards/<name>/timeout_rate": "Fraction of the step's completions whose call exceeded the time limit.",
        "rewards/<name>/crash_rate": "For an environment's own reward: fraction of conversations whose process died.",
        "rewards/<name>/memory_rate": "For an environment's own reward: fraction of conversations whose process "
        "exceeded its memory limit.",
        "time/rewards/<name>/p50": "Median duration of the reward's last 1,000 calls, in seconds.",
        "time/rewards/<name>/p95": "95th percentile of the duration of the reward's last 1,000 calls, in seconds.",
    },
    "Completions": {
        "completions/mean_length": "Mean length in sampled tokens, stop token included. In a conversation, tokens of "
        "tools and environments do not count.",
        "completions/min_length": "Length of the shortest completion, in sampled tokens.",
        "completions/max_length": "Length of the longest completion, in sampled tokens.",
        "completions/mean_terminated_length": "Mean length of the completions that were not truncated.",
        "completions/min_terminated_length": "Length of the shortest completion that was not truncated.",
        "completions/max_terminated_length": "Length of the longest completion that was not truncated.",
        "completions/clipped_ratio": "Fraction of completions cut off by `rollout.max_completion_length`.",
        "completions/repetition_ratio": "Fraction of completions ended by `rollout.max_repeats`.",
        "num_prompts": "Prompts sampled at this step, including those added by dynamic sampling.",
        "num_tokens": "Tokens sampled at this step, including those added by dynamic sampling.",
    },
    "Conversations": {
        "turns/mean": "Mean number of the model's turns in a conversation.",
        "stop/<reason>": "Fraction of conversations that ended for this reason: `stop`, `done`, `length`, `max_turns`, "
        "`failed`, …",
        "tools/call_frequency": "Tool calls per completion.",
        "tools/failure_frequency": "Fraction of tool calls that failed: an exception, an unknown tool, or wrong "
        "arguments.",
        "environment/<name>/<metric>": "A metric that an agent returned, averaged over the rollouts that returned it.",
        "environment/failures/<kind>": "Number of conversations since the start of the run whose environment failed by "
        "`error`, `timeout`, `crash` or `memory`. They are left out of their group's baseline.",
    },
    "Policy": {
        "loss": "The loss, with the denominators of the whole step. Absent if every update of the step was skipped.",
        "grad_norm": "Norm of the gradient before clipping.",
        "learning_rate": "Learning rate of the step.",
        "entropy": "Entropy in nats at the sampling temperature, averaged over all tokens of the step's groups. Exact, "
        "over the whole vocabulary, for tokens that the update sees. For completions without advantage, the mean of "
        "-log p of their tokens, which has the same expectation (exact again if a filter reshapes the distribution).",
        "kl": "Estimated KL divergence to the reference, averaged over tokens. Without a penalty it is measured at "
        "every tenth step (`log.kl`).",
        "beta": "Weight of the KL penalty at this step, if the penalty is on.",
        "teacher/kl": "KL(policy ‖ teacher) in nats, averaged over the tokens that the update sees: exact, over the "
        "`top_k` tokens and the rest, or estimated from the sampled tokens, as `teacher.kl` says.",
        "adapter_delta": "Norm of the change that the adapter makes to the weights since the start of the run; with "
        "`adapter.path`, beyond what the adapter changed at first. It proves that the weights move.",
        "skipped_updates": "Updates of this step that were skipped because the loss or the gradient was not finite.",
        "updates_without_signal": "Updates of this step whose gradient was exactly 0. The optimizer was not called, so "
        "neither momentum nor weight decay moved a weight.",
        "steps_without_signal": "Steps since the start in which every update had a gradient of exactly 0.",
        "off_policy_kept": "Fraction of tokens that the off-policy mask keeps (`loss.off_policy_mask_threshold`).",
        "clip_ratio/low_mean": "Fraction of tokens below the lower bound with an advantage below 0, so that the bound "
        "binds. The bound is on the ratio, the log-ratio or the probability, as the loss variant says; variants "
        "without bounds do not have these metrics.",
        "clip_ratio/high_mean": "Fraction of tokens above the upper bound with an advantage above 0.",
        "clip_ratio/region_mean": "Fraction of tokens that either bound binds.",
        "clip_ratio/low_min": "Lowest `clip_ratio/low_mean` of a single completion.",
        "clip_ratio/high_max": "Highest `clip_ratio/high_mean` of a single completion.",
        "clip_ratio/delta_mean": "Fraction of tokens with a ratio above `loss.delta` and an advantage below 0.",
    },
    "Sampler against trainer": {
        "sampling/sampling_logp_difference/mean": "Mean absolute difference between the generator's logprobs and the "
        "trainer's. grpo warns at 3 times what rounding explains, and stops the run at 30 times "
        "(`optim.max_logp_difference`).",
        "sampling/sampling_logp_difference/max": "Largest absolute difference between these logprobs.",
        "sampling/unfiltered_logp_difference/mean": "With a filter (`top_k`, `top_p`, `min_p`, `repetition_penalty`, "
        "`min_completion_length`), the same difference for the logprobs before the filter. This value is then "
        "compared with the bound of `optim.max_logp_difference`.",
        "sampling/importance_sampling_ratio/min": "Lowest ratio of the trainer's to the sampler's probability of a "
        "token, before truncation.",
        "sampling/importance_sampling_ratio/mean": "Mean of these ratios.",
        "sampling/importance_sampling_ratio/max": "Highest of these ratios.",
        "sampling/sequence_importance_sampling_ratio/min": "Lowest such ratio for a whole completion.",
        "sampling/sequence_importance_sampling_ratio/max": "Highest such ratio for a whole completion.",
        "sampling/effective_sample_size": "(Σw)² / (N Σw²) over tokens, where w is the ratio of a token: 1 if all "
        "ratios are equal.",
    },
    "Older groups": {
        "reuse/groups": "Number of older groups that the step learned from (`rollout.reuse`). They count in `loss`, "
        "`entropy`, `clip_ratio/*` and in a `kl` that is a term of the loss. They do not count in metrics of the "
        "step's own samples, such as `reward` or `sampling/*`.",
        "policy_lag/mean": "Training steps between the policy that sampled a completion and the policy that learned "
        "from it, averaged over completions. Only with `rollout.reuse` or `ranks`.",
        "policy_lag/max": "Largest lag of a completion.",
    },
    "Sampling and training apart": {
        "time/wait_sampler": "Seconds that the trainers waited for the slowest sampler (`ranks`).",
        "time/wait_trainer": "Seconds that the samplers waited for the slowest trainer.",
        "time/exchange": "Seconds in which the processes exchanged completions and the policy.",
        "ranks/sampling": "Share of the step in which samplers worked, averaged over samplers.",
        "ranks/training": "Share of the step in which trainers worked, averaged over trainers.",
    },
    "Data": {
        "epoch": "Number of passes over the rows so far. Absent with `data.curriculum`, which has no epochs.",
        "dropped_prompts": "Rows skipped since the start because the prompt was too long or null.",
        "sources/<name>/share": "Share of the step's tasks that came from this source of `data.sources`.",
        "sources/<name>/reward": "`reward` over this source's completions alone, at steps with such completions.",
        "sources/<name>/reward_std": "`reward_std` over this source's groups alone.",
        "sources/<name>/frac_reward_zero_std": "`frac_reward_zero_std` over this source's groups alone.",
        "sources/<name>/solved_all": "`solved_all` over this source's groups alone.",
        "sources/<name>/solved_none": "`solved_none` over this source's groups alone.",
        "sources/<name>/mixed": "`mixed` over this source's groups alone.",
        "sources/<name>/mean_length": "`completions/mean_length` over this source's completions alone.",
        "sources/<name>/epoch": "`epoch` of this source's rows.",
        "sources/<name>/dropped_prompts": "`dropped_prompts` of this source's rows.",
        "curriculum/<pool>": "Number of tasks in each pool of the curriculum after the step: `hard`, `normal`, `easy`, "
        "`unseen`. With `data.sources`, `curriculum/<source>/<pool>`.",
        "curriculum/solve_rate/<percent>": "Number of tasks whose solve rate is at least this percentage and below the "
        "next; `90` includes 100.",
        "curriculum/drawn/<pool>": "Share of the step's tasks drawn from each pool.",
    },
    "Speed and memory": {
        "step_time": "Duration of the step in seconds.",
        "time/rollout": "Seconds spent sampling. Finished groups are scored during this time.",
        "time/reward": "Seconds that the step waited for scores after its last token was sampled.",
        "time/logprobs": "Seconds spent making batches and running the passes before the first update: logprobs of the "
        "reference, the anchor and the teacher.",
        "time/update": "Seconds spent on updates.",
        "rollout_tokens_per_second": "Sampled tokens divided by `time/rollout`.",
        "peak_memory_gb": "Peak memory of MLX since the start, in units of 2³⁰ bytes.",
        "update/useful_tokens": "Of the tokens that go through the model in an update, the fraction that is neither "
        "padding nor a repeated prompt.",
        "speculation/accepted": "Mean number of guessed tokens per row that turned out right, over the decoding steps "
        "that were fed guesses. The terminal shows it as `0.5 accepted per decoding step`.",
        "speculation/width": "Mean number of tokens that a decoding step fed to each row: the last token and the "
        "guesses. 1 means that no step was fed guesses.",
        "speculation/gain": "How much faster the rollout was than without guesses, from measured step times. Only with "
        "`rollout.speculate: auto`, and only if steps without guesses were measured. The terminal shows it as "
        "`drafts: 1.50 × as fast`.",
    },
    "Alarms": {
        "alarms": "What went wrong in the run: a list of objects with `kind`, `step`, `what` (what happened) and "
        "`advice`, in the line of the step or evaluation that showed it first. Absent if there is no new alarm.",
    },
    "Evaluation": {
        "n": "Held-out prompts that were evaluated.",
        "grader": "The reward that decides whether an answer is right: the first of `rewards`, or the environment's.",
        "failed_gradings": "Number of completions on which the grader failed. They count as wrong.",
        "greedy": "Fraction of prompts answered right at temperature 0.",
        "avg@<k>": "Fraction of right answers among k sampled completions of each prompt.",
        "pass@<k>": "Probability that at least one of k sampled completions is right; unbiased (arXiv 2107.03374).",
        "maj@<k>": "Fraction of prompts for which the majority of the final answers is right. The final answer is in "
        "`\\boxed{}`, after `####`, or else the last number.",
        "rewards/<name>": "Mean score of each reward over the sampled completions.",
        "<metric>_interval": "95 % interval over prompts, low and high: Wilson's where each prompt's value is 0 or 1, "
        "otherwise the bootstrap's.",
    },
}
"""Meanings by section of the reference. Metrics of `Evaluation` are in `eval.jsonl`, all others in `metrics.jsonl`."""


def meaning(name: str) -> str | None:
    """The meaning of a metric, or None for a metric that a user's reward or data source logs."""
    return next((text for pattern, text in _patterns() if pattern.fullmatch(name)), None)


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    named = [item for section in MEANINGS.values() for item in section.items()]
    named.sort(key=lambda item: item[0].count("<"))  # exact names come before patterns that also match
    return [(re.compile(re.sub("<[^>]+>", ".+", re.escape(name))), text) for name, text in named]
