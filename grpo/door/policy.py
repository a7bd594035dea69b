"""`grpo.load`: loads a model to sample from, train, and save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlx.core as mx

from grpo.backend.device import setup
from grpo.backend.random import derive_key
from grpo.config import AdapterConfig, DataConfig, LossConfig, ModelConfig, RolloutConfig
from grpo.data.prompts import PromptRenderer
from grpo.door.checks import batches_of, kind_of, unknown_setting, whole_number
from grpo.door.environments import as_environment
from grpo.door.learning import BatchList, Loss
from grpo.door.optimizers import PolicyOptimizer
from grpo.door.tasks import TaskLists
from grpo.environments.environment import Environment
from grpo.errors import UserError
from grpo.generation.controller import speculation_of
from grpo.generation.generator import Generator
from grpo.model.adapters import REFERENCE, Adapters
from grpo.model.load import load as load_model
from grpo.model.policy import Policy
from grpo.objective.loss import CustomLoss
from grpo.planning.positions import limit_of
from grpo.recipes import with_settings
from grpo.rollout import RolloutEngine, sampling_of
from grpo.training.batches import batch_logprobs
from grpo.training.gradients import Gradient, Gradients
from grpo.training.passes import PassSettings, passes_of
from grpo.training.update import Update
from grpo.types import Batch, Group, Prompt, Task

SAID_BY = "grpo.load"
SAMPLE = "policy.sample"


def load(name: str | Path, *, seed: int = 0, **settings: Any) -> LoadedPolicy:
    """Load a policy: a model with a trainable adapter, its tokenizer, and its generator.

    `name` is a Hub repository, a folder, or a built-in model such as `builtin:arithmetic-student`. `settings` are the
    settings of a recipe's sections `model` (`dtype`, `quantize`, `revision`, `head_dtype`) and `adapter` (`rank` (16),
    `scale` (2.0: the update is scale × B A), `type` ("lora", "dora" or "full"), `targets`, `layers`, `dropout`,
    `use_rslora`, `path`: a saved adapter to start from), and `temperature` (1.0: for sampling and all logprobs),
    `max_concurrency` (64: rows that decode simultaneously), `speculate` ("auto": speculative decoding where it is
    faster, with the same tokens), `chat_template` ("auto") and `chat_template_kwargs`. A new adapter (LoRA, arXiv
    2106.09685) is drawn from `seed`; it does not change the model before its first update.

    Raises UserError for a model that cannot be loaded, a setting that does not exist or is out of bounds, and an
    adapter that does not fit.

    >>> policy = grpo.load("builtin:arithmetic-student", rank=4)
    >>> (group,) = policy.sample(["What is 1+2+3+4?"], n=2, max_tokens=8)
    >>> [len(rollout.trajectory.behaviour) <= 8 for rollout in group.rollouts]
    [True, True]
    """
    sections = (ModelConfig(name=str(name)), AdapterConfig(), RolloutConfig(), DataConfig(source=str(name)))
    taken: list[Any] = []
    allowed = (set(ModelConfig.model_fields) - {"name"}, set(AdapterConfig.model_fields), *_ALSO)
    known = set().union(*allowed)
    if unknown := sorted(set(settings) - known):
        raise unknown_setting(SAID_BY, unknown[0], known)
    for section, names in zip(sections, allowed, strict=True):
        own = {key: value for key, value in settings.items() if key in names}
        taken.append(with_settings(section, own, SAID_BY))
    return LoadedPolicy(*taken, seed=seed)


_ALSO = ({"temperature", "max_concurrency", "speculate"}, {"chat_template", "chat_template_kwargs"})
"""Settings of `rollout` and `data` that `grpo.load` accepts."""
OF_SAMPLING = {
    *("top_k", "top_p", "min_p", "repetition_penalty"),
    *("min_completion_length", "stop", "stop_token_ids", "max_repeats"),
}
_ARGUMENTS = ("tasks", "n", "max_tokens", "key", "temperature", "environment")


class LoadedPolicy:
    """A model that samples and learns. `model` is the MLX module, and `tokenizer` is mlx-lm's tokenizer."""

    def __init__(
        self, model: ModelConfig, adapter: AdapterConfig, rollout: RolloutConfig, data: DataConfig, *, seed: int
    ) -> None:
        setup()
        self.seed, self._rollout, self._data = seed, rollout, data
        self.model, self.tokenizer = load_model(model)
        adapters = Adapters(self.model, adapter, derive_key(seed, "adapter"))
        self.inner = Policy(self.model, adapters, rollout.temperature)
        self.generator = Generator(self.model, self.tokenizer, rollout.max_concurrency)
        self.generator.speculation = speculation_of(rollout.speculate)
        self.dropout_seed = seed if adapter.dropout > 0 else None
        self._gradients: dict[tuple[str, CustomLoss | None], Gradients] = {}

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of a prompt: text, or chat messages. Text goes through the model's chat template, if it
        has one, as a user's message (see `chat_template`). Raises UserError for messages without a chat template."""
        return self._encoded(_task(prompt, 0)).prompt_ids

    def sample(
        self,
        tasks: Sequence[Task | Prompt] | Task | str,
        n: int | None = None,
        max_tokens: int | None = None,
        key: int | mx.array = 0,
        *,
        temperature: float | None = None,
        environment: Environment | type[Environment] | str | None = None,
        **settings: Any,
    ) -> list[Group]:
        """Sample `n` completions of each task. Returns a group per task, in order.

        `tasks` is a list from `grpo.tasks`, or a list of texts or of lists of chat messages; a single text is one
        prompt. A completion has at most `max_tokens` tokens, including its stop token. `key` (a number such as the
        step, or an MLX key, uint32 `[2]`) and the policy's seed determine the draws: the same key gives the same
        completions. Each rollout's `trajectory` has `token_ids`, `text`, `finish_reason`, and fp32 logprobs per token,
        in nats, at the policy's temperature (`behaviour`). At another `temperature` (0: greedy) there are no logprobs,
        because such completions cannot be trained on. `environment` makes the trajectories: an object, a class, or a
        name (`"file.py:Class"`); by default a single turn.
        The defaults are the recipe's (8 completions of 256 tokens). `settings` are the recipe's settings for sampling:
        `top_k`, `top_p`, `min_p`, `repetition_penalty`, `stop`, `stop_token_ids`, `max_repeats`,
        `min_completion_length`.

        Raises UserError for a prompt that cannot be encoded, for a prompt that exceeds the model's context length
        together with `max_tokens`, and for settings that are unknown or out of bounds.
        """
        if unknown := sorted(set(settings) - OF_SAMPLING):
            raise unknown_setting(SAMPLE, unknown[0], OF_SAMPLING, _ARGUMENTS)
        asked = {"max_completion_length": max_tokens} if max_tokens is not None else {}
        rollout = with_settings(self._rollout, {**asked, **settings}, SAMPLE)
        n = rollout.num_generations if n is None else whole_number(n, f"{SAMPLE}: n")
        if n < 1:
            raise UserError(f"{SAMPLE}: n is {n}, but must be at least 1")
        at = rollout.temperature if temperature is None else _checked_temperature(temperature)
        own = at == rollout.temperature
        draws = self._key(key)
        ready = [self._encoded(task) for task in _tasks(tasks)]
        self._refuse_too_long(ready, rollout.max_completion_length)
        made = None if environment is None else as_environment(environment, SAMPLE)
        engine = RolloutEngine(self.generator, sampling_of(rollout), made)
        return engine.rollout(ready, n, at, draws, logprobs=own) if ready else []

    def logprobs(self, batch: Batch) -> mx.array:
        """Return log p of a batch's tokens under the current policy: float32 `[B, T]`, in nats, at its temperature.

        Values at padding are meaningless. Differentiable like other MLX functions.
        """
        return batch_logprobs(self.inner, batch)[0]

    def reference(self) -> AbstractContextManager[None]:
        """Return a context manager that makes the policy the reference: the model without its adapter, or the adapter
        from which it started."""
        return self.inner.use(REFERENCE)

    def gradient(self, batches: Batch | Sequence[Batch], loss: LossConfig | Callable[..., Any]) -> Gradient:
        """Return the gradient of a loss for one batch, or for the sum over several batches.

        `loss` is a `grpo.Loss`, or a custom function `(current, batch, cfg) -> per-token loss`. `current`, float32
        `[B, T]`, is log p of the tokens, and differentiable. `batch` has its columns `[B, T]`, with 0 at tokens that
        are not trained on; `anchor` is always present (at first the current policy's logprobs). The function returns
        `[B, T]`. The loss is the sum of `batch.weights` × per-token loss. The result has `loss`, `metrics`, and
        `arrays`, float32 by the parameters' paths; `opt.update(policy, gradient)` applies it.

        Raises RunError if a custom function fails or returns another shape.
        """
        several = batches_of(batches, "policy.gradient")
        cfg, custom = _split(batches, loss)
        if cfg.top_entropy_quantile < 1 and isinstance(batches, Batch):
            raise UserError("policy.gradient: top_entropy_quantile needs all batches: pass them as one list")
        key = (repr(cfg), custom)
        if key not in self._gradients:
            self._gradients[key] = Gradients(self.inner, cfg, custom)
        return self._gradients[key](self._enriched(several, cfg))

    def update(
        self,
        batches: Batch | Sequence[Batch],
        opt: PolicyOptimizer,
        loss: LossConfig | Callable[..., Any] | None = None,
    ) -> Update:
        """Make one update with the batches of `grpo.batches`: clip the gradient and apply it. With `num_iterations`,
        the optimizer makes several.

        `loss` is by default the loss of the batches. The result has `loss`, `grad_norm` (before clipping) and `metrics`
        by TRL's names. An update that is not finite is skipped (`skipped`), and an update without a signal is not
        applied (`without_signal`). Raises RunError after `max_skipped_updates` consecutive updates that are not finite.
        """
        if not isinstance(opt, PolicyOptimizer):
            raise UserError(
                f"policy.update(batches, opt): opt: expected an optimizer of grpo.optimizer, got {kind_of(opt)}"
            )
        several = batches_of(batches, "policy.update(batches, opt)")
        if loss is None and not isinstance(batches, BatchList):
            raise UserError("policy.update: only the list returned by grpo.batches has a loss: pass loss=...")
        cfg, custom = _split(batches, batches.loss if loss is None and isinstance(batches, BatchList) else loss)
        updater = opt.updater(self, cfg, custom)
        enriched = self._enriched(several, cfg, drops=self.dropout_seed is not None)
        opt.steps_done += 1
        return updater([enriched], opt.steps_done)

    def save(self, folder: str | Path) -> Path:
        """Write the adapter to a folder in mlx-lm's format, for `mlx_lm.generate --adapter-path`, `grpo generate MODEL
        --adapter` and `grpo.load(..., path=folder)`. Returns the folder. Raises UserError if it cannot be written."""
        return save_adapter(self.inner, folder)

    def _key(self, key: Any) -> mx.array:
        if isinstance(key, mx.array):
            return key
        return derive_key(self.seed, "rollout", whole_number(key, f"{SAMPLE}: key"))

    def _encoded(self, task: Task) -> Task:
        if task.prompt_ids:
            return task
        data = with_settings(self._data, {"source": task.source or self._data.source}, SAID_BY)
        return PromptRenderer(data, self.tokenizer, self.generator.decoding.vocabulary).encoded(task)

    def _refuse_too_long(self, tasks: Sequence[Task], max_tokens: int) -> None:
        longest = max((len(task.prompt_ids) for task in tasks), default=0)
        limit = limit_of(self.model)
        if limit is not None and longest + max_tokens > limit:
            raise UserError(
                f"{SAMPLE}: a prompt of {longest:,} tokens and a completion of up to {max_tokens:,} (max_tokens) "
                f"exceed the model's {limit:,} positions (max_position_embeddings): shorten the prompt, or lower "
                "max_tokens"
            )

    def _enriched(self, batches: list[Batch], loss: LossConfig, drops: bool = False) -> list[Batch]:
        """Return the batches with the columns that the loss needs."""
        minibatches = [batches]
        for enrich in passes_of(PassSettings(loss, drops)):
            minibatches = enrich(self.inner, minibatches)
        return minibatches[0]


def save_adapter(policy: Policy, folder: str | Path) -> Path:
    """Write the trained weights to a folder in mlx-lm's format. Raises UserError if they cannot be written."""
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        policy.adapters.save(path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: the adapter cannot be saved here: {error}") from error
    return path


def _tasks(given: Any) -> list[Task]:
    """Return tasks or prompts, or a single task or prompt, as a list of tasks. Raises UserError for other values."""
    if isinstance(given, TaskLists):
        raise UserError(f"{SAMPLE}: expected a list of tasks, got the iterator of grpo.tasks: pass next(tasks)")
    if isinstance(given, Task | str):
        given = [given]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise UserError(f"{SAMPLE}: expected a list of tasks or prompts, got {kind_of(given)}")
    return [_task(task, place) for place, task in enumerate(given)]


def _task(task: Any, place: int) -> Task:
    """Return a task, or make a task from a prompt."""
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping) and "role" in task:
        raise UserError(
            f"{SAMPLE}: prompt {place} is a single chat message, but a prompt is a list of messages: write [[message]]"
        )
    messages = isinstance(task, list) and task and all(isinstance(m, Mapping) and "role" in m for m in task)
    if not isinstance(task, str) and not messages:
        raise UserError(
            f"{SAMPLE}: prompt {place}: expected a task of grpo.tasks, a text, or a list of chat messages, got "
            f"{kind_of(task)}"
        )
    return Task(place, task, (), {}, "prompts")


def _split(batches: Any, loss: Any) -> tuple[LossConfig, CustomLoss | None]:
    """Return the settings of a loss, and the function that replaces the surrogate, if there is one."""
    if isinstance(loss, str):
        return Loss(loss), None  # type: ignore[arg-type]  # the schema refuses unknown names
    if isinstance(loss, LossConfig):
        return loss, None
    if not callable(loss):
        raise UserError(f"loss: expected a grpo.Loss, its name or a function, got {kind_of(loss)}")
    own = batches.loss if isinstance(batches, BatchList) else LossConfig()
    return own, loss


def _checked_temperature(temperature: Any) -> float:
    """Return a sampling temperature; 0 is greedy. Raises UserError for values that a recipe would refuse."""
    if isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0:
        return 0.0
    try:
        return with_settings(RolloutConfig(), {"temperature": temperature}, SAMPLE).temperature
    except UserError as error:
        raise UserError(f"{error} 0 is greedy.") from None
