"""`grpo.Trainer`: runs like `grpo train` from Python, with rewards and data as objects."""

from __future__ import annotations

import inspect
import re
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Never

from rich.console import Console

from grpo.config import Recipe
from grpo.door.checks import kind_of, unknown_argument
from grpo.door.handing import handed
from grpo.door.opening import How, Opening
from grpo.door.policy import save_adapter
from grpo.door.recipes import recipe as make_recipe
from grpo.door.rewards import Rewardable
from grpo.door.stopping import STOP
from grpo.errors import RunError, UserError
from grpo.model.policy import Policy
from grpo.runs.folder import is_run
from grpo.runs.given import MakeSource
from grpo.runs.loop import Log, Outcome
from grpo.runs.signals import BY_CODE, StopRequest
from grpo.telemetry.jsonl import read_steps
from grpo.types import EvalMetrics, StepMetrics

StepCallback = Callable[[StepMetrics | EvalMetrics], Any]
FLAGS = {
    "resume": "train(resume=True)",
    "resume-from": "train(resume=CHECKPOINT)",
    "resume-changed": "train(resume=True, changed=True)",
    "overwrite": "train(overwrite=True)",
}
"""The Python equivalents of the options of `grpo train`, for messages that name an option."""


TRLS = {
    "args": "recipe",
    "reward_funcs": "rewards",
    "train_dataset": "data",
    "eval_dataset": "eval_data",
    "environment_factory": "environment",
}
"""Our names for arguments of TRL's `GRPOTrainer`. `grpo.trl` has the arguments that are settings of a recipe."""

Why = Literal["finished", "stopped"]
ENDS: dict[bool, Why] = {True: "finished", False: "stopped"}


@dataclass(frozen=True, slots=True)
class Ending:
    """How `Trainer.train` ended.

    step           the last step
    why            `finished` or `stopped`
    checkpoint     the folder of the last checkpoint; None before the first step
    before, after  the first and the last evaluation, if there were any
    worse          a message, if the last evaluation is below the first beyond their 95 % intervals: by how much, and
                   what to try
    """

    step: int
    why: Why
    checkpoint: Path | None
    before: EvalMetrics | None = field(default=None, repr=False)
    after: EvalMetrics | None = field(default=None, repr=False)
    worse: str | None = None


class Trainer:
    """A run like `grpo train`'s, with rewards and data as Python objects: `grpo.Trainer(grpo.recipe("quickstart"))`.

    It does everything that the command does: it compares sampling with training, evaluates, logs, saves checkpoints in
    the recipe's `output_dir`, and resumes. `recipe` is a recipe from `grpo.recipe`, or a recipe's name or file. These
    arguments replace the recipe's values:

        rewards    a list of functions, names and `grpo.reward(...)`; the first reward grades evaluations. Functions
                   run in this process, without a time limit.
        data       the prompts to train on: a datasets.Dataset, a list of dicts, a pandas DataFrame, or a text as in a
                   recipe's `data.source`
        eval_data  the held-out prompts, in the same forms; a recipe without a section `eval` gets a default section
        loss       a function `(current, batch, cfg) -> per-token loss`, each `[B, T]`; see `LoadedPolicy.gradient`
        source     a function or a class that creates the source of tasks, such as a curriculum, from the stream of the
                   recipe's data; see `grpo.data.source.Source`
        environment  what the model talks to in several turns: a class, or a function that creates an object, as in
                   TRL's `environment_factory`; an object with `async def rollout(self, task, sampler)`; or
                   `"file.py:Class"`. `{"agent": run}` is a function that calls the model itself, and
                   `{"command": [...]}` is a program that does
        environments  several environments, in a dict by name; the data's column `environment` selects one
        tools      a list of functions and classes that the model may call, and names such as `"calculator"`
        callbacks  a function or a list of functions, which are called, after the run's own logs, with each
                   `grpo.StepMetrics` (its `groups` are the sampled groups with scores and advantages; with
                   `rollout.reuse` also the older groups of the update, which are `replayed`) and each
                   `grpo.EvalMetrics`. A callback that returns `grpo.STOP` ends the run after that step; any other
                   return value except None is an error. An exception ends the run, and `train` raises it.

    Environments and tools given by name run in separate processes. If any of them is a class or function, all of them
    run in this process: a time limit there ends the conversation but not the call, and a crash ends the run. Instead of
    a class or function, a dict may hold further settings, as in a recipe:
    `environment={"use": Game, "max_turns": 20}`.

    With `quiet`, nothing is printed. The model is loaded when it is first needed. Raises UserError for arguments that
    do not fit together.

    >>> trainer = grpo.Trainer(recipe, rewards=[my_reward], quiet=True)
    >>> trainer.train().why
    'finished'
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        *,
        rewards: Sequence[Rewardable] | None = None,
        data: Any = None,
        eval_data: Any = None,
        loss: Callable[..., Any] | None = None,
        source: MakeSource | None = None,
        environment: Any = None,
        environments: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        callbacks: StepCallback | Sequence[StepCallback] = (),
        quiet: bool = False,
        **unknown: Never,
    ) -> None:
        if unknown:
            raise unknown_argument("grpo.Trainer", next(iter(unknown)), inspect.signature(Trainer), TRLS)
        self.callbacks = _callbacks(callbacks)
        cfg = recipe if isinstance(recipe, Recipe) else make_recipe(recipe)
        self.recipe, self._given = handed(cfg, rewards, data, eval_data, loss, source, environment, environments, tools)
        # Print plain lines: a notebook would show each print of a rich console as a block of HTML.
        self._console = Console(quiet=quiet, force_jupyter=False)
        self._opening: Opening | None = None
        self._began = False
        self._stop: StopRequest | None = None

    def train(self, *, resume: bool | str | Path = False, overwrite: bool = False, changed: bool = False) -> Ending:
        """Train until the recipe's last step.

        A second call resumes where the first was interrupted and gives the same numbers, bitwise on a CPU. If an
        earlier process left a run in the folder, `resume=True` resumes after its newest checkpoint (or begins, if there
        is none), `resume=FOLDER` resumes after that checkpoint, and `overwrite` replaces the run. `changed` resumes
        even if the recipe, code, or data has changed.

        Ctrl-C (a notebook's "interrupt") ends training, saves the last finished step, and raises KeyboardInterrupt. It
        does not replace signal handlers that you have set, and handles no other signal. Raises UserError if the folder
        already holds a run, and RunError if the run cannot continue, or if no step had a training signal.
        """
        self._refuse_while_training()
        if overwrite:
            self.close()
            self._began = False
        opening = self._opened(self._how(resume, overwrite, changed))
        self._began = True
        opening.check()
        stop = self._stop = StopRequest.in_a_session(lambda: self._console.print("stopping after the last whole step"))
        try:
            with opening.loop(stop, [self._tell(stop)]) as loop:
                outcome = loop.run()
        finally:
            self._stop = None
            trainer = opening.run.trainer
            if trainer.before.halfway or trainer.policy.is_spread:  # the weights belong to no step, or are only a part
                self.close()
        opening.finish(outcome, "trainer.train()")
        return self._ended(outcome)

    def evaluate(self) -> EvalMetrics:
        """Evaluate the current policy on the held-out prompts of the recipe's section `eval`: greedy, avg@k, pass@k and
        maj@k, as fractions, with 95 % intervals. Writes nothing. Raises UserError for a recipe without `eval`."""
        opening = self._ready()
        if opening.run.evaluator is None:
            raise UserError(
                'the recipe has no section eval: grpo.recipe(..., eval={"every": 25}), or '
                "grpo.Trainer(..., eval_data=...)"
            )
        return opening.run.evaluator(self._step())

    def save(self, folder: str | Path) -> Path:
        """Write the current adapter to a folder in mlx-lm's format, for `mlx_lm.generate --adapter-path`,
        `grpo generate MODEL --adapter` and `grpo.load(..., path=folder)`. Returns the folder."""
        return save_adapter(self.policy, folder)

    def stop(self) -> None:
        """Make `train` end after the last finished step. Call it from a callback, a reward, or another thread."""
        if self._stop is not None:
            self._stop.ask()

    @property
    def policy(self) -> Policy:
        """The policy in training, with its `model`, `adapters`, and `logprobs`."""
        return self._ready().run.trainer.policy

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, as mlx-lm loads it."""
        return self._ready().run.trainer.engine.generator.tokenizer

    @property
    def folder(self) -> Path:
        """The run's folder: `metrics.jsonl`, `eval.jsonl`, `completions/`, `checkpoints/`."""
        return Path(str(self.recipe.output_dir))

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics of each step so far, including `step`, as in `metrics.jsonl`."""
        steps = read_steps(self.folder) if is_run(self.folder) else []
        return [{"step": float(record.step), **record.values} for record in steps]

    def close(self) -> None:
        """End the processes of rewards, and free the model. A later call loads both again, in the state of the last
        saved step."""
        if self._opening is not None:
            self._opening.run.opened.close()
        self._opening = None

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _how(self, resume: bool | str | Path, overwrite: bool, changed: bool) -> How:
        checkpoint = None if isinstance(resume, bool) else Path(resume)
        return How(bool(resume) or self._began, checkpoint, changed, overwrite)

    def _opened(self, how: How) -> Opening:
        """Return the loaded run. Errors name the arguments of `train` instead of the command's options."""
        with _in_python():
            opening = Opening(self.recipe, how, self._console, self._given, self._opening)
        if self._opening is None or opening.run is not self._opening.run:
            self.close()
            weakref.finalize(self, opening.run.opened.close)
        self._opening = opening
        return opening

    def _ready(self) -> Opening:
        """Return the run in its current state, and load it if necessary. Writes nothing."""
        if self._opening is not None:
            return self._opening
        opening = self._opened(How(resume=self._began, dry=not self._began))
        opening.load()
        return opening

    def _step(self) -> int:
        steps = self.history if self._began else []
        return int(steps[-1]["step"]) if steps else 0

    def _tell(self, stop: StopRequest) -> Log:
        def tell(record: StepMetrics | EvalMetrics) -> None:
            for callback in self.callbacks:
                answer = callback(record)
                if answer is STOP:
                    stop.ask()
                elif answer is not None:
                    raise UserError(
                        f"callback {getattr(callback, '__name__', callback)!r} returned {str(answer)[:80]!r}: a "
                        "callback returns None, or grpo.STOP to end the run"
                    )

        return tell

    def _ended(self, outcome: Outcome) -> Ending:
        if outcome.untrained is not None:
            raise RunError(outcome.untrained)
        if outcome.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        assert outcome.stopped_by in (None, BY_CODE)
        state, why = outcome.state, ENDS[outcome.stopped_by is None]
        return Ending(state.step, why, outcome.checkpoint, state.before, state.after, outcome.worse)

    def _refuse_while_training(self) -> None:
        if self._stop is not None:
            raise UserError("train() is already running, in another thread or as the caller of this callback")


def _callbacks(given: Any) -> list[StepCallback]:
    """Return one or several callbacks as a list. Raises UserError for a value that is not callable."""
    several = [given] if callable(given) else given
    if not isinstance(several, Iterable):
        raise UserError(f"grpo.Trainer: callbacks: expected a function or a list of functions, got {kind_of(given)}")
    several = list(several)
    if odd := [one for one in several if not callable(one)]:
        raise UserError(f"grpo.Trainer: callbacks: expected functions, got {kind_of(odd[0])}")
    return several


@contextmanager
def _in_python() -> Iterator[None]:
    """Rewrite UserErrors inside the block to name the arguments of `train` instead of the command's options."""
    try:
        yield
    except UserError as error:
        said = re.sub(r"--resume-from (.+?)(?=:)", lambda m: f"train(resume={m[1]!r})", str(error))
        said = re.sub(r"--(resume-changed|resume-from|resume|overwrite)\b(?!-)", lambda m: FLAGS[m[1]], said)
        raise UserError(said) from error
