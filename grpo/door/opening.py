"""Opens a run: what `grpo train` and `grpo.Trainer` both do before and after the steps."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from grpo.backend import device
from grpo.backend.ranks import Ranks
from grpo.config import LogConfig, Recipe
from grpo.data.prompts import last_text
from grpo.planning.parity import check_parity
from grpo.plugins import SESSION
from grpo.runs.given import NOTHING, Given
from grpo.runs.loop import Log, Loop, Outcome
from grpo.runs.prepare import Prepared, prepare
from grpo.runs.resume import as_planned, context, find_start, plan_of
from grpo.runs.revisions import revisions_of
from grpo.runs.signals import StopRequest
from grpo.runs.state import RunState
from grpo.scoring.rehearsal import rehearse
from grpo.telemetry.loggers import find_loggers, open_loggers
from grpo.telemetry.summary import failure_lines, print_outcome, print_plan
from grpo.training.packing import Packing
from grpo.types import FAILURES, EvalMetrics, StepMetrics


@dataclass(frozen=True, slots=True)
class How:
    """The options of `grpo train` for how a run begins. `checkpoint` is the checkpoint to resume from."""

    resume: bool = False
    checkpoint: Path | None = None
    changed: bool = False
    overwrite: bool = False
    dry: bool = False


class Opening:
    """A loaded run: `run` holds its prepared parts, `cfg` is its recipe.

    Call `check`, then `loop`, and after the loop `finish`.
    """

    def __init__(
        self, cfg: Recipe, how: How, console: Console, given: Given = NOTHING, former: Opening | None = None
    ) -> None:
        """Load the run. `former` is an earlier opening of the same run in this process, whose loaded parts are reused.

        Raises UserError as `find_start` and `prepare` do. Writes nothing.
        """
        self.console, self.ranks = console, Ranks.launched()
        self._start = find_start(cfg, how.resume, how.checkpoint, how.changed, how.overwrite, how.dry, given)
        self.cfg, self.given, self.planned = self._start.cfg, given, self._start.planned
        self._own = find_loggers(self.cfg.log)
        self.ranks.wait()  # every process checks the folder before rank 0 creates it
        reusable = former is not None and self.planned in (former.planned, former.decided)
        self.run: Prepared = former.run if former is not None and reusable else self._loaded()
        self._state: RunState | None = None

    def _loaded(self) -> Prepared:
        with self.console.status("loading"):
            return prepare(self.planned, self.given)

    @property
    def decided(self) -> Recipe:
        """The recipe with the plan's values instead of `auto`, as a resumed run uses it."""
        return as_planned(self.planned, plan_of(self.run.trainer))

    def load(self) -> None:
        """Load the state from which the run begins. Raises UserError for a state that does not fit."""
        self._state = self._start.load(self.run.trainer)

    def check(self) -> None:
        """Print the plan, load the state from which the run begins, and compare decoding with training.

        Raises UserError for a state that does not fit, and RunError if decoding and training disagree.
        """
        run, cfg, console = self.run, self.cfg, self.console
        notes = [*run.notes, *self._start.notes, *_unsent(cfg.log)]
        converses = bool(cfg.conversations)
        print_plan(console, cfg.model, cfg.data, cfg.rewards, device.describe(), run.plan, notes, converses)
        self.load()
        policy, engine = run.trainer.policy, run.trainer.engine
        packing = Packing.of(run.trainer.cfg.optim, run.trainer.cfg.rollout)
        parity = self.ranks.checked(lambda: check_parity(policy, engine, run.tasks[:4], cfg.seed, packing))
        console.print(parity, highlight=False, soft_wrap=True)

    def rehearse(self) -> None:
        """Print where memory goes, call each reward once on made-up completions, and print the results."""
        trainer = self.run.trainer
        for line in self.run.planner.report(self.run.plan):
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        for note in rehearse(trainer.scorer, self.run.tasks, trainer.engine.generator.tokenizer.encode):
            self.console.print(note, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def loop(self, stop: StopRequest, also: Sequence[Log] = ()) -> Iterator[Loop]:
        """Return the run's loop for a `with` block. Inside the block, the folder and the loggers are open, and signals
        are handled.

        The functions in `also` are called with every step and evaluation, after the loggers. An exception of theirs
        ends the run.
        """
        run, cfg, trainer = self.run, self.cfg, self.run.trainer
        state, self._state = self._state, None  # do not hold the initial arrays until the run ends
        assert state is not None, "call `check` first"
        written = context(
            cfg, trainer.policy.adapters.config, plan_of(trainer), revisions_of(trainer.cfg), run.rows, self.given
        )
        with ExitStack() as stack:
            folder = stack.enter_context(self._start.folder()) if self.ranks.first else self.folder
            resumed = state if self._start.goes_on else None
            checkpoint, self._start = self._start.checkpoint, replace(self._start, state=None)
            told = [*also] if self.ranks.first else []
            if self.ranks.first:
                watched = (trainer.engine.generator, trainer.scorer, trainer.update)
                console, own = self.console, self._own
                told.insert(0, open_loggers(stack, cfg, folder, console, state.run_id, watched, own, resumed))
            stack.enter_context(stop)
            loop = Loop(trainer, folder, written, _telling(told), stop, state, checkpoint, run.evaluator)
            del state, resumed
            yield loop

    @property
    def folder(self) -> Path:
        """The run's folder, which may not exist yet."""
        return Path(str(self.cfg.output_dir))

    def finish(self, outcome: Outcome, go_on: str) -> None:
        """Print how the run ended. `go_on` is the command that resumes a stopped run."""
        scorer, ranks = self.run.trainer.scorer, self.ranks
        kinds = {kind: ranks.sum_counts(scorer.failures_of(kind)) for kind in FAILURES}
        failures = failure_lines(kinds, scorer.environments)
        print_outcome(self.console, outcome, self.folder, self._example(), failures, go_on)
        ranks.finish()

    def _example(self) -> str | None:
        """Return the arguments for `grpo generate` to try the run. None if it cannot hold the run's conversations,
        because the environment, a tool, or the data is an object of this session."""
        cfg = self.cfg
        if not cfg.conversations:
            return shlex.quote(last_text(self.run.tasks[0].prompt))
        uses = [*(talk.what for talk in cfg.conversations.values()), *(tool.use for tool in cfg.tools)]
        if "data" in self.given.data or any((use or "").startswith(f"{SESSION}:") for use in uses):
            return None
        return "--row 0"


def _telling(logs: Sequence[Log]) -> Log:
    """Return a function that calls all logs."""

    def tell(record: StepMetrics | EvalMetrics) -> None:
        for log in logs:
            log(record)

    return tell


def _unsent(cfg: LogConfig) -> list[str]:
    """Return a note if W&B is configured but nobody is logged in: the run then stays in its folder."""
    from grpo.doctor.services import wandb

    if cfg.wandb is None or cfg.wandb.mode == "offline" or (found := wandb()).status == "ok":
        return []
    why = found.text.removesuffix(" (only log.wandb needs it)")
    return [f"W&B: {why}: the run stays in its folder for `wandb sync`, unless you first {found.remedy}"]
