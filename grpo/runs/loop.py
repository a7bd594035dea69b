"""The loop around the steps: evaluations, logs and checkpoints between steps, and an end without lost work."""

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
    """How a run ended: its state, the state's checkpoint (None before the first step), and the signal that stopped it.

    `untrained` is a message if the run made all its steps but trained nothing, `worse` a message if it made the model
    worse. `began` is the step after which the run was resumed (0 for a new run).
    """

    state: RunState
    checkpoint: Path | None
    stopped_by: int | None
    untrained: str | None = None
    worse: str | None = None
    began: int = 0


class Loop:
    """Runs a trainer from a state to the recipe's last step.

    `state` is always the state after the last finished step; it is saved when a later step fails or is stopped. The
    loop holds its counts and the trainer its arrays: the trainer completes a step or restores the arrays. A copy of the
    arrays here would keep full weights in memory twice.
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
        """`checkpoint` is the checkpoint that `start` was loaded from, if any. `evaluate` measures the policy after a
        step, `tell` passes metrics to the loggers."""
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
        """Run all remaining steps, or until a stop is requested.

        However the run ends, also by an error, the last finished step (if any) is saved in a checkpoint. There are two
        exceptions, in which a message says what is lost: an error in the middle of a step's updates of full weights,
        and an error while processes hold parts of the model. Raises RunError if the checkpoint cannot be written, and
        LostRankError if another process was lost; the first remaining process has then saved the last step, unless
        the lost process held a part of the model.
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
        if self.stop.signal is not None:  # perhaps only in this process: after the last step, ranks do not compare
            self._note_end("stopped")
            return Outcome(state, self._saved, self.stop.signal, began=self._began)
        worse = made_worse(state, self.cfg)
        self._note_end(UNTRAINED if untrained else WORSE if worse else "finished")
        return Outcome(state, self._saved, None, untrained, worse, self._began)

    def _step(self) -> None:
        step = self.state.step + 1
        with self._keeps_failed(step), self.trainer.wholly(), self._interrupts():
            metrics = self.trainer.step(step)
        means = [metrics.values["reward"]] if "reward" in metrics.values else []
        rewarded, rewards = self.state.rewarded or bool(means), (*self.state.rewards, *means)
        start = self.state.start if step > 1 else lowest_mean(metrics.groups)
        self._move(replace(self.state, step=metrics.step, rewarded=rewarded, rewards=rewards, start=start))
        # after _move, because the weights are already those of this step, even if something here fails
        metrics, past = after_step(metrics, self.state.past, self._terms)
        self.state = replace(self.state, past=past)
        self.tell(metrics)
        if self.ranks.first:
            self._store(metrics)
        self._warn(metrics)

    def _warn(self, record: StepMetrics | EvalMetrics) -> None:
        """Log the alarms of a record, in the first process only."""
        for alarm in record.alarms if self.ranks.first else ():
            log.warning("%s", alarm)

    def _move(self, state: RunState) -> None:
        self.state = replace(state, trainer=replace(state.trainer, counts=self.trainer.counts()))
        self._is_saved = False

    def _whole_state(self) -> RunState:
        """The state with the trainer's current arrays."""
        return replace(self.state, trainer=replace(self.state.trainer, arrays=self.trainer.arrays()))

    def _interrupts(self) -> AbstractContextManager[None]:
        """A block that a stop request may leave. Several processes leave it together, or the others would wait."""
        everyone = self.ranks.everyone
        if everyone.size == 1:
            return self.stop.interrupts()
        if signals := [number for number in everyone.gather(self.stop.signal) if number is not None]:
            self.stop.signal = signals[0]  # a signal to any process stops the whole run
            raise Stopped
        return self.ranks.interrupts()

    def _hold(self) -> None:
        """From here on, a stop waits until the step is finished."""
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
        """Whether an evaluation is due after this step and was not already made before the run was stopped."""
        assert self.cfg.eval is not None
        made = self.state.after is not None and self.state.after.step == step
        return not made and (step % self.cfg.eval.every == 0 or step == self.cfg.optim.steps)

    def _save(self) -> None:
        """Write a checkpoint. If that fails, warn and continue: the checkpoint before it is intact."""
        try:
            self._write()
        except OSError as error:
            if self.ranks.first:
                log.warning("%s. Training continues; the next checkpoint may succeed.", self._unsaved(error))

    def _store(self, metrics: StepMetrics) -> None:
        """Store the step's completions. If that fails, warn and continue."""
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
        """A block that stores the completions on which a reward broke, before the error ends the run.

        Raises RunError.
        """
        try:
            yield
        except BrokenRewardError as error:
            raise RunError(f"{error}{self._store_failed(error, error.step or step)}") from error

    def _store_failed(self, error: BrokenRewardError, step: int) -> str:
        """Store the completions that a reward failed on, unless `log.completions` is off. Returns a text that says
        where they are."""
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
            raise RunError(f"{self._unsaved(error)}. Make room there and continue with --resume.") from error

    def _save_after_error(self) -> None:
        """Save the last finished step, unless other processes hold parts of it: after an error they may not answer."""
        if not self.trainer.divided:
            self._save_last()
        elif not self._is_saved and self.state.step > 0 and self.ranks.first:
            log.warning(
                "Step %d is not saved: other processes hold parts of the model, and after an error they may not "
                "answer; %s. A smaller checkpoint.every loses fewer steps.",
                self.state.step,
                self._newest(),
            )

    def _write(self) -> None:
        """Save the state, in the first process, or in the first remaining process after a loss."""
        with self._writing:
            trainer = self.trainer
            writes = self.ranks.keeper or trainer.divided
            if self._is_saved or self.state.step == 0 or not (writes and trainer.whole):
                return
            if self.trainer.before.halfway:
                log.warning("%s", self._lost())
                return
            state = self._whole_state()  # in all processes: each holds parts of a divided model
            error: OSError | None = None
            try:
                if self.ranks.keeper:
                    self._write_here(state)
            except OSError as raised:
                error = raised
            state.trainer.finish()
            if trainer.divided:  # all processes must agree on whether to save again
                error = self.ranks.everyone.gather(error)[0]
            if error is not None:
                raise error
            self._is_saved = True

    def _write_here(self, state: RunState) -> None:
        there = self.folder / CHECKPOINTS
        with nullcontext() if self.ranks.first else taken_over(self.folder):
            if not self.ranks.first and newest_whole(there)[0] == checkpoint_path(there, state.step):
                return  # the first process saved it before it was lost
            restore_folder(self.folder, self.context.recipe, self.cfg)
            self._saved = save_checkpoint(there, state, self.context, self.cfg.checkpoint.keep)

    def _last_resort(self) -> str:
        """Save the last finished step while the main thread is stuck in the next one. Afterwards this process exits.

        Returns a message about what is saved.
        """
        if not self.trainer.divided:
            self.trainer.before.put_back(self.trainer.update.optimizer)
            self._write()
        saved = self._what_is_saved()
        self._note_end("failed", f"another process was lost. {saved}")
        return saved

    def _unsaved(self, error: OSError) -> str:
        why = error.strerror or error
        return f"step {self.state.step} could not be saved in {self.folder / CHECKPOINTS}: {why}; {self._newest()}"

    def _newest(self) -> str:
        newest, _ = newest_whole(self.folder / CHECKPOINTS)
        return f"the newest intact checkpoint is {newest}" if newest else "there is no intact checkpoint yet"

    def _saved_after_loss(self) -> str:
        """Save the last step after another process was lost. Returns a message about it."""
        try:
            if not self.trainer.divided:  # else the lost process held a part of the state
                self._save_last()
        except RunError as error:
            return str(error)
        return self._what_is_saved()

    def _what_is_saved(self) -> str:
        newest, _ = newest_whole(self.folder / CHECKPOINTS)
        if newest is None:
            return "No step is saved: start again with --resume or --overwrite"
        one = " (a single process needs model.shard=null)" if self.trainer.divided else ""
        return f"The run is saved in {newest}: continue with --resume, with any number of processes{one}"

    def _lost(self) -> str:
        """The message for a step that failed in the middle of its updates, when the weights before it are gone."""
        newest, _ = newest_whole(self.folder / CHECKPOINTS)
        rest = (
            f"the newest intact checkpoint is {newest}. Later steps are lost, and --resume repeats them"
            if newest
            else "there is no intact checkpoint yet, so all steps of this run are lost"
        )
        return (
            f"Step {self.state.step} could not be saved: step {self.state.step + 1} failed in the middle of its update "
            "of the weights, and a run with adapter.type: full holds only one copy of them; "
            f"{rest}. A smaller checkpoint.every loses fewer steps."
        )


def better(best: Best | None, metrics: EvalMetrics, name: str) -> Best | None:
    """The better of the best evaluation so far and a new one, by the metric `name`. A tie keeps the earlier one.

    An evaluation without a value of the metric never becomes the best.
    """
    value = metrics.values.get(name)
    if value is None or (best is not None and best.value >= value):
        return best
    return Best(metrics.step, value)
