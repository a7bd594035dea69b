"""The loop around the steps: evaluations, logs and checkpoints between them, and an end that loses nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from grpo.alarms.watch import after_measuring, after_step
from grpo.backend.secrets import masked
from grpo.errors import LostRankError, RunError, UserError
from grpo.runs.alarming import terms_of
from grpo.runs.checkpoint import Context, checkpoint_path, newest_whole, save_checkpoint
from grpo.runs.completions import store_completions, store_failed
from grpo.runs.folder import (
    CHECKPOINTS,
    COMPLETIONS,
    ENDED,
    FAILED,
    NOT_FINITE,
    UNTRAINED,
    WORSE,
    restore_folder,
    taken_over,
)
from grpo.runs.health import lowest_mean, made_worse, trained_on_nothing
from grpo.runs.signals import Stopped, StopRequest
from grpo.runs.state import Best, RunState
from grpo.scoring.scorer import BrokenRewardError
from grpo.training.trainer import Trainer
from grpo.types import EvalMetrics, StepMetrics

Log = Callable[[StepMetrics | EvalMetrics], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: its state, the checkpoint of it (none before the first step), and the signal that stopped it.

    `untrained` says why a run that made all its steps has trained nothing, `worse` that it made the model worse.
    `began` is the step that it went on after.
    """

    state: RunState
    checkpoint: Path | None
    stopped_by: int | None
    untrained: str | None = None
    worse: str | None = None
    began: int = 0


class Loop:
    """Takes a trainer from a state to the recipe's last step.

    `state` is always that of the last step that was finished, and what is saved when a later one fails or is stopped.
    Its counts are here and its arrays in the trainer, which makes a step wholly or not at all: to hold arrays here
    through the next step would keep whole weights in memory twice.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        context: Context,
        tell: Log,
        stop: StopRequest,
        start: RunState,
        checkpoint: Path | None = None,
        evaluate: Callable[[int], EvalMetrics] | None = None,
    ) -> None:
        """`checkpoint` is where `start` was loaded from, if it was. `evaluate` measures the policy after a step."""
        self.trainer, self.folder, self.context = trainer, folder, context
        self.evaluate = evaluate
        self.tell, self.stop = tell, stop
        self.cfg = trainer.cfg
        self.state = replace(start, trainer=replace(start.trainer, arrays={}))
        self._saved, self._is_saved, self._began = checkpoint, True, start.step
        self.ranks, self._writing = trainer.ranks, threading.Lock()
        self._terms = terms_of(trainer)
        trainer.update.inspect = folder / NOT_FINITE
        trainer.before.hold = self._hold

    def run(self) -> Outcome:
        """All steps that are left, until the last or until asked to stop.

        However it ends, an error included, there is a checkpoint of the last step that was finished (if one was);
        only an error in the middle of a step's updates of whole weights leaves the newest checkpoint as it is, and that
        is said. Raises RunError where the checkpoint cannot be written, and LostRankError where another process was
        lost: the first process that is left has saved the last step.
        """
        with self.ranks.keeps(self._last_resort):
            return self._run()

    def _run(self) -> Outcome:
        try:
            self._evaluate()
            while self.state.step < self.cfg.optim.steps:
                self._step()
                self._evaluate()
                if self.state.step % self.cfg.checkpoint.every == 0:
                    self._save()
        except Stopped:
            pass
        except LostRankError as error:
            saved = self._saved_after_loss()
            self._note_end("failed", f"{error}. {saved}")
            raise LostRankError(f"{error}. {saved}", error.speaks) from None
        except BaseException as error:  # of other people's code too: a logger may raise KeyboardInterrupt
            self._save_after_error()
            known = isinstance(error, RunError | UserError)
            self._note_end("failed", str(error) if known else f"{type(error).__name__}: {error}")
            raise
        self._save_last()
        state = self._whole_state()
        scorer = self.trainer.scorer
        untrained = trained_on_nothing(state, self.cfg.loss, scorer.weights, scorer.environments)
        untrained = self.ranks.everyone.gather(untrained)[0]  # a process that only samples has no count of updates
        if self.stop.signal is not None:  # in this process alone, perhaps: after the last step nobody asks the others
            self._note_end("stopped")
            return Outcome(state, self._saved, self.stop.signal, began=self._began)
        worse = made_worse(state, self.cfg)
        self._note_end(UNTRAINED if untrained else WORSE if worse else "finished")
        return Outcome(state, self._saved, None, untrained, worse, self._began)

    def _step(self) -> None:
        step = self.state.step + 1
        with self._keeps_failed(step), self.trainer.wholly(), self._interrupts():
            metrics = self.trainer.step(step)
        had = [metrics.values["reward"]] if "reward" in metrics.values else []
        rewarded, rewards = self.state.rewarded or bool(had), (*self.state.rewards, *had)
        start = self.state.start if step > 1 else lowest_mean(metrics.groups)
        self._move(replace(self.state, step=metrics.step, rewarded=rewarded, rewards=rewards, start=start))
        metrics, past = after_step(
            metrics, self.state.past, self._terms
        )  # the weights are of this step, whatever fails
        self.state = replace(self.state, past=past)
        self.tell(metrics)
        if self.ranks.first:
            self._store(metrics)
        self._warn(metrics)

    def _warn(self, record: StepMetrics | EvalMetrics) -> None:
        """Say what goes wrong, in one of several processes."""
        for alarm in record.alarms if self.ranks.first else ():
            log.warning("%s", alarm)

    def _move(self, state: RunState) -> None:
        self.state = replace(state, trainer=replace(state.trainer, counts=self.trainer.counts()))
        self._is_saved = False

    def _whole_state(self) -> RunState:
        """The state with its arrays, as the trainer has them now."""
        return replace(self.state, trainer=replace(self.state.trainer, arrays=self.trainer.arrays()))

    def _interrupts(self) -> AbstractContextManager[None]:
        """A block that a stop may leave; of several processes none does so alone, or the others would wait for it."""
        everyone = self.ranks.everyone
        if everyone.size == 1:
            return self.stop.interrupts()
        if asked := [number for number in everyone.gather(self.stop.signal) if number is not None]:
            self.stop.signal = asked[0]  # whichever was asked, the run was stopped
            raise Stopped
        return self.ranks.interrupts()

    def _hold(self) -> None:
        """From here on a step is to be finished."""
        self.stop.hold()
        self.ranks.hold()

    def _evaluate(self) -> None:
        step, evaluate = self.state.step, self.evaluate
        if evaluate is None or not self._due(step):
            return
        with self._keeps_failed(step), self._interrupts():
            metrics = evaluate(step)
        best = better(self.state.best, metrics, self.cfg.best_metric) if step > 0 else self.state.best
        before = self.state.before or metrics
        improved = best is not self.state.best
        metrics, past = after_measuring(metrics, self.state.past, self._terms)
        self._move(replace(self.state, before=before, after=metrics, best=best, past=past))
        self.tell(metrics)
        self._warn(metrics)
        if improved:
            self._save()

    def _due(self, step: int) -> bool:
        """Whether an evaluation belongs after this step and was not made before a stop."""
        assert self.cfg.eval is not None
        made = self.state.after is not None and self.state.after.step == step
        return not made and (step % self.cfg.eval.every == 0 or step == self.cfg.optim.steps)

    def _save(self) -> None:
        """Write a checkpoint; where that fails, say so and go on: the one before is whole."""
        try:
            self._write()
        except OSError as error:
            if self.ranks.first:
                log.warning("%s. Training goes on; the next checkpoint may succeed.", self._unsaved(error))

    def _store(self, metrics: StepMetrics) -> None:
        """Keep the step's completions, if there is room for them."""
        cfg, folder = self.cfg, self.folder / COMPLETIONS
        try:
            setting, learnt = cfg.log.completions, cfg.rollout.prompts_per_step
            decode = self.trainer.engine.generator.tokenizer.decode
            store_completions(
                folder,
                metrics.step,
                metrics.groups,
                setting,
                cfg.seed,
                learnt,
                lambda token: str(decode([token], skip_special_tokens=True)),
            )
        except OSError as error:
            why = error.strerror or error
            log.warning("the completions of step %d could not be stored: %s", metrics.step, why)

    def _note_end(self, word: str, error: str = "") -> None:
        """Leave a word on how the run ended, and the error if one ended it, for `grpo runs` and `grpo report`."""
        if self.ranks.keeper:
            with suppress(OSError):  # the folder may be what is gone
                text = f"{word}\n{masked(error)}\n" if error else f"{word}\n"
                (self.folder / ENDED).write_text(text, encoding="utf-8", errors="replace")

    @contextmanager
    def _keeps_failed(self, step: int) -> Iterator[None]:
        """A block that keeps the completions on which a reward broke, before that ends the run. Raises RunError."""
        try:
            yield
        except BrokenRewardError as error:
            raise RunError(f"{error}{self._store_failed(error, error.step or step)}") from error

    def _store_failed(self, error: BrokenRewardError, step: int) -> str:
        """Keep the completions that a reward failed on, unless none are to be stored. Returns where they are."""
        if self.cfg.log.completions is None or not self.trainer.keeps_records:
            return ""
        try:
            path = store_failed(self.folder / FAILED, step, error.groups)
        except OSError as unwritten:
            return f"\n(The completions could not be stored: {unwritten.strerror or unwritten})"
        return f"\nThe completions, with the error for each, are in {path}"

    def _save_last(self) -> None:
        try:
            self._write()
        except OSError as error:
            self._note_end("failed", self._unsaved(error))
            raise RunError(f"{self._unsaved(error)}. Make room there and go on with --resume.") from error

    def _save_after_error(self) -> None:
        """Save what is finished, unless other processes have parts of it: they may be elsewhere, and never answer."""
        if not self.trainer.divided:
            self._save_last()
        elif not self._is_saved and self.state.step > 0 and self.ranks.first:
            log.warning(
                "Step %d is not saved: other processes have parts of the model, and after an error nobody knows "
                "whether they answer; %s. A smaller checkpoint.every loses fewer steps.",
                self.state.step,
                self._newest(),
            )

    def _write(self) -> None:
        """Save the state, in the first process, or in the first that is left after a loss."""
        with self._writing:
            trainer = self.trainer
            writes = self.ranks.keeper or trainer.divided
            if self._is_saved or self.state.step == 0 or not (writes and trainer.whole):
                return
            if self.trainer.before.halfway:
                log.warning("%s", self._lost())
                return
            state = self._whole_state()  # of a divided model all processes have parts
            error: OSError | None = None
            try:
                if self.ranks.keeper:
                    self._write_here(state)
            except OSError as raised:
                error = raised
            if trainer.divided:  # all of them try again, or none
                error = self.ranks.everyone.gather(error)[0]
            if error is not None:
                raise error
            self._is_saved = True

    def _write_here(self, state: RunState) -> None:
        there = self.folder / CHECKPOINTS
        with nullcontext() if self.ranks.first else taken_over(self.folder):
            if not self.ranks.first and newest_whole(there)[0] == checkpoint_path(there, state.step):
                return  # the first process has saved it before it was lost
            restore_folder(self.folder, self.context.recipe, self.cfg)
            self._saved = save_checkpoint(there, state, self.context, self.cfg.checkpoint.keep)

    def _last_resort(self) -> None:
        """Save the last finished step while the main thread is stuck in the next one: this process ends after that."""
        if self.trainer.divided:
            return
        self.trainer.before.put_back(self.trainer.update.optimizer)
        self._write()
        self._note_end("failed")

    def _unsaved(self, error: OSError) -> str:
        why = error.strerror or error
        return f"step {self.state.step} could not be saved in {self.folder / CHECKPOINTS}: {why}; {self._newest()}"

    def _newest(self) -> str:
        newest, _ = newest_whole(self.folder / CHECKPOINTS)
        return f"the newest whole checkpoint is {newest}" if newest else "there is no whole checkpoint yet"

    def _saved_after_loss(self) -> str:
        """Save the last step where another process was lost. Returns what is said of that."""
        try:
            if not self.trainer.divided:  # or a part of the state was with the others
                self._save_last()
        except RunError as error:
            return str(error)
        newest, _ = newest_whole(self.folder / CHECKPOINTS)
        if newest is None:
            return "No step is saved: begin again, with --resume or --overwrite"
        return f"Saved is {newest}: --resume goes on after it, with fewer or more processes too"

    def _lost(self) -> str:
        """What is said where a step ended in the middle of its updates and the weights before it are gone."""
        newest, _ = newest_whole(self.folder / CHECKPOINTS)
        rest = (
            f"the newest whole checkpoint is {newest}. What came after it is lost, and --resume makes those steps again"
            if newest
            else "there is no whole checkpoint yet, so all steps of this run are lost"
        )
        return (
            f"Step {self.state.step} could not be saved: step {self.state.step + 1} failed in the middle of its update "
            f"of the weights, and a run of adapter.type: full holds them only once; {rest}. A smaller checkpoint.every "
            "loses fewer."
        )


def better(best: Best | None, metrics: EvalMetrics, name: str) -> Best | None:
    """The better of the best so far and a new evaluation by the metric `name`; of equals the earlier.

    An evaluation in which nothing could be scored by that metric is not the better one.
    """
    value = metrics.values.get(name)
    if value is None or (best is not None and best.value >= value):
        return best
    return Best(metrics.step, value)
