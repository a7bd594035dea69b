"""`grpo.Trainer`: the command's run, from Python, with rewards and data as objects."""

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
"""What the options of `grpo train`, which messages name, are called here."""


TRLS = {
    "args": "recipe",
    "reward_funcs": "rewards",
    "train_dataset": "data",
    "eval_dataset": "eval_data",
    "environment_factory": "environment",
}
"""What arguments of TRL's `GRPOTrainer` are called here; `grpo.trl` knows those that are settings of a recipe."""

Why = Literal["finished", "stopped"]
ENDS: dict[bool, Why] = {True: "finished", False: "stopped"}


@dataclass(frozen=True, slots=True)
class Ending:
    """How `Trainer.train` ended: after which step, why, and where its last checkpoint is (None before the first step).

    `worse` says, where the model got worse (its last evaluation is below the first, beyond their 95 % intervals), by
    how much and what to try.
    """

    step: int
    why: Why
    checkpoint: Path | None
    before: EvalMetrics | None = field(default=None, repr=False)
    after: EvalMetrics | None = field(default=None, repr=False)
    worse: str | None = None


class Trainer:
    """A run like `grpo train`'s, with rewards and data as Python objects: `grpo.Trainer(grpo.recipe("quickstart"))`.

    It does all that the command does: the check of sampling against training, evaluations, logs, checkpoints in the
    recipe's `output_dir`, and resuming. `recipe` is what `grpo.recipe` gives, or a recipe's name or file. In the place
    of what the recipe names:

        rewards    a list of functions, names and `grpo.reward(...)`; the first of them grades evaluations. Functions
                   run in this process, without a time limit.
        data       the prompts to train on: a datasets.Dataset, a list of dicts, a pandas DataFrame, or text that a
                   recipe's `data.source` could be
        eval_data  the held-out prompts, likewise; a recipe without a section `eval` gets one with its defaults
        loss       a function `(current, batch, cfg) -> per-token loss`, each `[B, T]`; see `LoadedPolicy.gradient`
        source     a function, or a class, that makes the source of tasks from the stream of the recipe's data: a
                   curriculum, say; see `grpo.data.source.Source`
        environment  whom the model talks to in several turns: a class, or a function that makes an object, as TRL's
                   `environment_factory`; an object with `async def rollout(self, task, sampler)`; or `"file.py:Class"`.
                   `{"agent": run}` is a function that asks the model itself, `{"command": [...]}` such a program
        environments  several of them by name, in a dict; the data's column `environment` says which
        tools      a list of functions and classes that the model may call, and names such as `"calculator"`
        callbacks  one function, or a list of functions, that are called, after the run's own logs, with each
                   `grpo.StepMetrics` (its `groups` are what was sampled, with scores and advantages; with
                   `rollout.reuse` also the older groups that it learnt from, which are `replayed`) and each
                   `grpo.EvalMetrics`. A callback that returns `grpo.STOP` ends the run after that step; any other
                   answer but None is an error. An exception ends the run too, and `train` raises it.

    What was given as a name lives in processes of its own. Classes and functions live in this process, with all beside
    them: a time limit ends the conversation there, but not the call, and a crash ends the run. In the place of one, a
    dict says more, as a recipe would: `environment={"use": Game, "max_turns": 20}`.

    With `quiet` nothing is printed. The model is loaded when it is first needed. Raises UserError for what does not fit
    together.

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
        # Plain lines: a notebook would show each print of a rich console as a block of HTML.
        self._console = Console(quiet=quiet, force_jupyter=False)
        self._opening: Opening | None = None
        self._began = False
        self._stop: StopRequest | None = None

    def train(self, *, resume: bool | str | Path = False, overwrite: bool = False, changed: bool = False) -> Ending:
        """Train until the recipe's last step.

        A second call goes on where the first was interrupted, to the same numbers, on a CPU to the bit. For a run that
        an earlier process left in the folder, `resume=True` goes on after its newest checkpoint (or begins, where there
        is none), a checkpoint's folder after that one; `overwrite` replaces the run. `changed` goes on though recipe,
        code or data have changed.

        Ctrl-C (a notebook's "interrupt") ends it with the last finished step saved, and raises KeyboardInterrupt;
        handlers that you have set yourself, and all other signals, stay yours. Raises UserError for a folder that holds
        another run, and RunError for a run that cannot go on, or of which no step had anything to learn from.
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
            if trainer.before.halfway or trainer.policy.is_spread:  # weights of no step, or a part of them
                self.close()
        opening.finish(outcome, "trainer.train()")
        return self._ended(outcome)

    def evaluate(self) -> EvalMetrics:
        """Measure the policy as it is on the held-out prompts of the recipe's section `eval`: greedy, avg@k, pass@k and
        maj@k, as fractions, with 95 % intervals. Writes nothing. Raises UserError for a recipe without `eval`."""
        opening = self._ready()
        if opening.run.evaluator is None:
            raise UserError(
                'the recipe has no section eval: grpo.recipe(..., eval={"every": 25}), or '
                "grpo.Trainer(..., eval_data=...)"
            )
        return opening.run.evaluator(self._step())

    def save(self, folder: str | Path) -> Path:
        """Write the adapter as it is into a folder, in mlx-lm's format: `mlx_lm.generate --adapter-path`,
        `grpo generate MODEL --adapter` and `grpo.load(..., path=folder)` read it. Returns the folder."""
        return save_adapter(self.policy, folder)

    def stop(self) -> None:
        """Ask `train` to end after the step that is finished: from a callback, a reward, or another thread."""
        if self._stop is not None:
            self._stop.ask()

    @property
    def policy(self) -> Policy:
        """The policy that trains: its `model`, its `adapters`, its `logprobs`."""
        return self._ready().run.trainer.policy

    @property
    def tokenizer(self) -> Any:
        """mlx-lm's tokenizer of the model."""
        return self._ready().run.trainer.engine.generator.tokenizer

    @property
    def folder(self) -> Path:
        """The run's folder: `metrics.jsonl`, `eval.jsonl`, `completions/`, `checkpoints/`."""
        return Path(str(self.recipe.output_dir))

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics of each step of the run so far, `step` included, as `metrics.jsonl` has them."""
        steps = read_steps(self.folder) if is_run(self.folder) else []
        return [{"step": float(record.step), **record.values} for record in steps]

    def close(self) -> None:
        """End the processes of rewards and let go of the model. A later call loads both again, as they were after the
        last step that was saved."""
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
        """The run, ready to be checked. Messages of the command's options are told in Python's words."""
        with _in_python():
            opening = Opening(self.recipe, how, self._console, self._given, self._opening)
        if self._opening is None or opening.run is not self._opening.run:
            self.close()
            weakref.finalize(self, opening.run.opened.close)
        self._opening = opening
        return opening

    def _ready(self) -> Opening:
        """The run as it is now, loaded if it is not; nothing is written."""
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
            raise UserError("train() is going on already, in another thread or in a callback's caller")


def _callbacks(given: Any) -> list[StepCallback]:
    """One callback, or several, as a list. Raises UserError for what cannot be called."""
    several = [given] if callable(given) else given
    if not isinstance(several, Iterable):
        raise UserError(f"grpo.Trainer: callbacks: expected a function or a list of functions, got {kind_of(given)}")
    several = list(several)
    if odd := [one for one in several if not callable(one)]:
        raise UserError(f"grpo.Trainer: callbacks: expected functions, got {kind_of(odd[0])}")
    return several


@contextmanager
def _in_python() -> Iterator[None]:
    """A block whose UserErrors name the arguments of `train`, not the options of the command."""
    try:
        yield
    except UserError as error:
        said = re.sub(r"--resume-from (.+?)(?=:)", lambda m: f"train(resume={m[1]!r})", str(error))
        said = re.sub(r"--(resume-changed|resume-from|resume|overwrite)\b(?!-)", lambda m: FLAGS[m[1]], said)
        raise UserError(said) from error
