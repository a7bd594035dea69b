"""The workload of a run, for which a plan is made: how much goes through the machine at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from grpo.backend.maths import largest_power_of_two
from grpo.config import AdapterConfig, EvalConfig, OptimConfig, RolloutConfig
from grpo.generation.memory import Need
from grpo.recipes import with_settings
from grpo.rollout import sampling_of
from grpo.training.binning import most_lines
from grpo.training.older import bytes_kept
from grpo.training.packing import WIDE, Packing, Shape

OLDER = "older groups"
"""The name in a plan of the groups that `rollout.reuse` keeps."""
MANY_ROWS = 4_096
"""For updates with more rows than this, repeating micro-batches are not enumerated one by one."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The sections of a recipe that determine the workload, and the lengths of the longest prompts in tokens.

    evaluation     None for a run without evaluations
    prompt_length  the longest prompt to train on
    longest        the longest prompt to sample from, held-out prompts included
    own            tokens of a prompt that each completion may have for itself, because environments add to prompts.
                   Their keys and values are not shared
    waits          whether completions wait for environments
    parts          minimum number of micro-batches in an update
    updates        whether the process makes updates: all do, except those that only sample (`ranks`)
    """

    optim: OptimConfig
    rollout: RolloutConfig
    adapter: AdapterConfig
    evaluation: EvalConfig | None
    prompt_length: int
    longest: int
    own: int = 0
    waits: bool = False
    parts: int = 1
    updates: bool = True

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.rollout.prompts_per_step * self.rollout.num_generations

    @property
    def tokens(self) -> int:
        """Maximum number of tokens in a step, counting a prompt for each completion."""
        return self.rows * (self.prompt_length + self.rollout.max_completion_length)

    def stays(self, cuda: bool) -> dict[str, int]:
        """Maximum bytes of the groups that `rollout.reuse` keeps. With CUDA they are in the host's memory: empty."""
        length = self.own + self.rollout.max_completion_length
        older = bytes_kept(self.rollout, self.optim.steps, self.prompt_length, length)
        return {OLDER: older} if older and not cuda else {}

    @property
    def packs(self) -> bool:
        """Whether completions may be packed into lines on a GPU."""
        return self.optim.pack_completions and self.optim.share_prompts

    def need(self) -> Need:
        """What is sampled together: the completions of a step or of an evaluation, whichever are more."""
        prompts, sampled, group = self.rollout.prompts_per_step, self.rows, self.rollout.num_generations
        if self.evaluation is not None:
            held_out = self.evaluation.prompts
            prompts, sampled = max(prompts, held_out), max(sampled, held_out * self.evaluation.samples)
            group = 1  # a greedy completion per prompt
        reshaped, length = sampling_of(self.rollout).reshaped, self.own + self.rollout.max_completion_length
        return Need(sampled, prompts, self.longest, length, reshaped, self.waits, group)

    def largest(self, tokens: int, gpu: bool, cuda: bool = False) -> list[Shape]:
        """The largest micro-batches of at most `tokens` tokens: the longest prompts with the longest completions in
        rows, and the widest lines if completions may be packed. `gpu`, `cuda`: what the machine has."""
        optim = with_settings(self.optim, {"micro_batch_tokens": tokens})
        packing = Packing.of(optim, self.rollout, self.parts, gpu=gpu, on_cuda=cuda)
        length = self.own + self.rollout.max_completion_length
        behind_prompts = min(length, WIDE) if packing.packs else length  # longer completions have their own lines
        return [self._in_rows(packing, behind_prompts), *self._shapes_of_lines(packing, length)]

    def shorter(self, tokens: int, gpu: bool) -> list[Shape]:
        """The largest micro-batches of at most `tokens` tokens with shorter completions, each 20 % shorter than the one
        before. They may take more memory, because attention keeps only the scores of short rows."""
        packing = Packing.of(
            with_settings(self.optim, {"micro_batch_tokens": tokens}), self.rollout, self.parts, gpu=gpu, on_cuda=False
        )
        length, found = self.own + self.rollout.max_completion_length, list[Shape]()
        while (length := 4 * length // 5) > 0:
            found.append(self._in_rows(packing, length))
        return found

    def through(self, shapes: Sequence[Shape]) -> int:
        """The tokens that go through the model in the largest of these micro-batches, padding included."""
        packing = Packing(1, 1, 1, shares=self.optim.share_prompts)
        return max(packing.through(shape) for shape in shapes)

    def _shapes_of_lines(self, packing: Packing, length: int) -> list[Shape]:
        if not packing.packs:
            return []
        before = self.prompt_length - 1
        found, longest = list[Shape](), before + length
        if widths := packing.widths(longest):
            width = max(widths)
            together = max(1, (width - before) // length)
            needed = 1 << (-(-packing.rows // together) - 1).bit_length()
            found.append(packing.shape_of_lines(min(needed, most_lines(packing.tokens, width)), width, packing.rows))
        if longest > WIDE:
            width = packing.width(longest)
            lines = min(most_lines(packing.tokens, width), largest_power_of_two(packing.rows))
            found.append(packing.shape_of_rows(lines, width))
        return found

    def _in_rows(self, packing: Packing, length: int) -> Shape:
        """The largest micro-batch that `packing.pack` makes from an update's rows if all rows have maximum length."""
        made = self._in_order(packing, length)
        if packing.parts > 1 and packing.multiple == 1:  # as in `pack`, all parts get about as many rows
            number = -(-len(made) // packing.parts) * packing.parts
            rows = min(packing.rows, -(-self.updated // number))
            made = self._in_order(replace(packing, rows=rows), length)
        return max(made, key=packing.through)

    @property
    def updated(self) -> int:
        """Rows of an update."""
        return -(-self.rollout.prompts_per_step // self.optim.num_minibatches) * self.rollout.num_generations

    def _in_order(self, packing: Packing, length: int) -> list[Shape]:
        made: list[Shape] = []
        begun = 0
        while begun < self.updated:
            rows = 1
            fitting = packing.shape(1, 1, self.prompt_length, length)
            assert fitting is not None, "a single row always fits"
            while begun + rows < self.updated:
                prompts = (begun + rows) // packing.group - begun // packing.group + 1
                shape = packing.shape(prompts, rows + 1, self.prompt_length, length)
                if shape is None:
                    break
                fitting, rows = shape, rows + 1
            made.append(fitting)
            begun += rows
            if begun % packing.group == 0 and self.updated > MANY_ROWS:  # the following micro-batches repeat these
                return made * -(-self.updated // begun)
        return made
