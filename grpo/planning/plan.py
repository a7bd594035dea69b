"""The plan of a run: what it will do and how much memory it needs."""

from __future__ import annotations

from dataclasses import dataclass

from grpo.planning.choosing import Checkpointing
from grpo.planning.machines import FREE, OF_A_LIMIT
from grpo.planning.workload import OLDER, Workload
from grpo.training.moments import has_moments
from grpo.training.packing import Shape


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run: counts, and bytes by purpose.

    steps          number of steps
    prompts, rows  prompts and completions per step
    tokens         maximum number of tokens per step
    parameters     number of parameters, without an adapter's
    trained        number of trained parameters
    stays          bytes that stay in memory, by purpose
    phases         additional bytes of each phase
    memory         bytes of the machine's memory, or of the recipe's limit (`limited`)
    slots          number of rows that are decoded simultaneously
    micro_batch    maximum number of tokens in a micro-batch
    checkpointing  checkpointed layers: all (True), none (False), or how many of `depth`
    kept_bytes     bytes left during a rollout for rows outside the slots, after the widest drafts that fit
    waiting        maximum bytes that rows waiting for environments would keep. The part that fits is in the phase
    fed            maximum number of tokens per row in a decoding step (`rollout.speculate`)
    drafts         additional bytes of such a step
    depth          number of layers
    shape          shape of the largest micro-batch
    lanes          number of micro-batches that are computed in parallel
    alone          whether micro-batches are computed one after the other because two would not fit
    logits         maximum number of logits of the head in memory
    cuda           whether the run is on CUDA
    quantized      whether the model is quantized
    offloaded      bytes of layers' inputs in the host's memory, which has room for `host` (None: unknown)
    whole          additional bytes of spread weights while they are whole, in all phases except updates
    """

    steps: int
    prompts: int
    rows: int
    tokens: int
    parameters: int
    trained: int
    stays: dict[str, int]
    phases: dict[str, int]
    memory: int
    slots: int
    micro_batch: int
    checkpointing: Checkpointing
    kept_bytes: int
    waiting: int = 0
    fed: int = 1
    drafts: int = 0
    depth: int = 0
    shape: Shape | None = None
    lanes: int = 1
    alone: bool = False
    logits: int = 0
    limited: bool = False
    cuda: bool = False
    quantized: bool = False
    offloaded: int = 0
    host: int | None = None
    whole: int = 0

    @property
    def total(self) -> int:
        """Estimated peak in bytes: what stays, and the largest phase."""
        return sum(self.stays.values()) + max(self.phases.values())

    @property
    def fits(self) -> bool:
        return self.fits_device and (self.host is None or self.offloaded <= self.host)

    @property
    def fits_device(self) -> bool:
        """Whether the run fits into the device's memory, without regard to offloaded bytes."""
        return self.slots > 0 and self.total <= self.memory

    @property
    def least(self) -> tuple[int, dict[str, int]]:
        """The bytes of memory that the run needs, and their parts: what stays, and last the largest phase.

        A rollout needs more memory than it uses, because its slots are planned with only a share of the memory.
        """
        stays = sum(self.stays.values())
        wanted = {name: stays + size for name, size in self.phases.items()}
        wanted["rollout"] = int(wanted["rollout"] / (OF_A_LIMIT if self.limited else FREE))
        largest = max(wanted, key=lambda name: wanted[name])
        return wanted[largest], {**self.stays, largest: self.phases[largest]}

    def lines(self) -> list[str]:
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        stays = ", ".join(f"{name} {size_of(size)}" for name, size in self.stays.items() if size)
        *phases, last = (f"{name} {size_of(size)}" for name, size in self.phases.items())
        largest = f"the largest of {', '.join(phases)} and {last}"
        return [
            f"{steps} of {self.prompts} prompts, {self.rows} completions, at most {self.tokens:,} tokens",
            f"trains {self.trained:,} of {self.parameters:,} parameters",
            f"memory about {size_of(self.total)} of {size_of(self.memory)}: {stays}, and {largest}",
            *self._of_whole(),
            *self._of_waiting(),
            f"updates in micro-batches of up to {self.micro_batch:,} tokens{self._longer}{self.checkpointed}"
            f"{ALONE if self.alone else ''}",
            *self._of_drafts(),
        ]

    def _of_drafts(self) -> list[str]:
        if self.fed == 1:
            return []
        return [
            f"drafted tokens may take {size_of(self.drafts)} more: a decoding step has up to {self.fed} tokens per row"
        ]

    @property
    def _longer(self) -> str:
        """A note on single rows with more tokens than a micro-batch may have; empty if there are none."""
        longer = self.shape is not None and self.shape.rows == 1 and self.shape.tokens > self.micro_batch
        return f", longer completions alone (up to {self.shape.tokens:,})" if longer and self.shape else ""

    @property
    def recomputed(self) -> float:
        """The share of the layers that the backward pass recomputes."""
        layers = self.checkpointing
        return float(layers) if isinstance(layers, bool) else min(1.0, layers / self.depth)

    @property
    def checkpointed(self) -> str:
        """How many layers are checkpointed, as the end of a sentence; empty if none are."""
        if not self.checkpointing:
            return ""
        whole = self.recomputed == 1
        return ", layers checkpointed" if whole else f", {self.checkpointing} of {self.depth} layers checkpointed"

    @property
    def rows_at_once(self) -> str:
        """A description of the largest micro-batch, with the number of parallel ones."""
        if self.shape is None:
            return ""
        prompts, before, rows, length, lines, width, _ = self.shape
        rows_alone = f"{rows} × {length:,} tokens after {prompts} × {before:,}"
        of_lines = "1 line" if lines == 1 else f"{lines} lines"
        at_once = f"{of_lines} of {width:,} tokens" if lines else rows_alone
        return f"{self.lanes} × ({at_once})" if self.lanes > 1 else at_once

    def _of_whole(self) -> list[str]:
        if not self.whole:
            return []
        return [f"outside updates weights are whole, which takes {size_of(self.whole)} of the rollout's memory"]

    def _of_waiting(self) -> list[str]:
        if not self.waiting:
            return []
        keep = f"completions that wait for their environments keep up to {size_of(self.waiting)} of keys and values"
        if self.waiting <= self.kept_bytes:
            return [keep]
        return [f"{keep}; {size_of(self.kept_bytes)} are available, beyond which the oldest are recomputed"]


ALONE = ", one after the other: two in parallel do not fit"


def why_not(plan: Plan, needed: int, parts: dict[str, int]) -> str:
    """The error for a run that does not fit: what it needs, what there is, and the parts of the need."""
    what = "memory.limit_gb allows" if plan.limited else "the machine has"
    if plan.fits_device:
        return (
            f"this cannot fit: optim.offload_activations moves {size_of(plan.offloaded)} of layers' inputs to the "
            f"host's memory, which has room for {size_of(plan.host or 0)}."
        )
    *stays, (phase, size) = parts.items()
    held = ", ".join(f"{name} {size_of(held)}" for name, held in stays if held)
    rows = "one completion" if plan.slots <= 1 else f"{plan.slots} completions simultaneously"
    return (
        f"this cannot fit: it needs {size_of(needed)}, but {what} {size_of(plan.memory)}. {held} stay in memory, and "
        f"{NEEDS[phase].format(plan=plan, shape=plan.rows_at_once, rows=rows)} takes {size_of(size)}."
    )


NEEDS = {
    "rollout": "decoding {rows}",
    "reward models' pass": "a pass of a reward model over completions",
    "update": "the update ({shape}{plan.checkpointed})",
    "checkpoint": "a checkpoint, whose arrays are whole,",
    "optimizer's step": "the optimizer's step",
}


OFFLOADED = "offloaded inputs"
"""The limiting part if the device has enough memory."""
PACKED = "rollout.kv_bits: 8 with loss.importance_sampling_correction: token_truncate"


def ways_out(plan: Plan, load: Workload) -> list[str]:
    """What to change to need less memory: first settings that can still be lowered, then larger changes."""
    *_, phase = [OFFLOADED] if plan.fits_device and not plan.fits else plan.least[1]
    ways = []
    if phase == "update" and plan.recomputed < 1:
        ways.append("optim.gradient_checkpointing: true")
    several = plan.shape is not None and plan.shape.rows > 1
    if phase in ("update", OFFLOADED) and load.optim.micro_batch_tokens != "auto" and several:
        ways.append("optim.micro_batch_tokens: auto")
    if phase == "update" and plan.cuda and not load.optim.offload_activations:
        ways.append("optim.offload_activations: true")
    if phase == "rollout" and load.rollout.kv_bits != 4:
        ways.append(PACKED if load.rollout.kv_bits is None else "rollout.kv_bits: 4")
    if phase == "reward models' pass":
        ways.append("a smaller batch_tokens in the reward model's kwargs")
    if plan.slots > 1 and sum(plan.stays.values()) + plan.phases["rollout"] > plan.memory:
        ways.append("a smaller rollout.max_concurrency")
    if plan.stays.get(OLDER, 0) > plan.memory // 20:
        ways.append("a smaller rollout.reuse")
    if phase != "optimizer's step":
        ways.append("a smaller rollout.max_completion_length or data.max_prompt_length")
    if phase == OFFLOADED:
        return [*ways, "a smaller model"]
    if load.adapter.type == "full":
        if load.optim.moments == "float32" and has_moments(load.optim):
            ways.append("optim.moments: int8")
        ways.append("adapter.type: lora")
    if plan.whole and phase == "rollout" and load.adapter.type != "full":
        ways.append("model.shard: tensor")
    fewer = (
        "a smaller model or one in fewer bits" if plan.quantized else "a smaller or quantized model (model.quantize)"
    )
    ways.append(fewer)
    if plan.limited:
        ways.append("a higher memory.limit_gb")
    return ways


def size_of(count: int) -> str:
    if count >= 2**30:
        return f"{count / 2**30:.1f} GB"
    return f"{count / 2**20:.0f} MB" if count >= 2**20 else f"{count / 2**10:.0f} kB"
