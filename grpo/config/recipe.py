"""A whole recipe: its sections, and the checks across sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from grpo.config.alarms import AlarmsConfig
from grpo.config.curriculum import check_graders
from grpo.config.data import DataConfig, EvalConfig, check_hub_only
from grpo.config.environment import EnvironmentConfig, ToolEntry
from grpo.config.log import CheckpointConfig, LogConfig
from grpo.config.memory import MemoryConfig
from grpo.config.model import AdapterConfig, ModelConfig
from grpo.config.objective import AdvantageConfig, LossConfig
from grpo.config.optim import OptimConfig
from grpo.config.ranks import RanksConfig, check_apart
from grpo.config.rewards import RewardConfig
from grpo.config.rollout import RolloutConfig
from grpo.config.section import MANY, Name, Section
from grpo.config.teacher import TeacherConfig
from grpo.presets import Baseline


def _off(given: Any) -> Any:
    """None for `off`, which YAML reads as false."""
    return None if given is False or given == "off" else given


class Recipe(Section):
    """A whole run. `data`, `model` and `optim.steps` are required. So is `rewards`, unless the recipe has an
    environment with its own reward, or a teacher.

    grpo looks for files and folders first next to the recipe, then in the working directory.
    """

    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of all randomness."""
    output_dir: Name | None = None
    """The run's folder. Default: `runs/<name of the recipe>`."""
    model: ModelConfig
    """The model to train, and its precision."""
    adapter: AdapterConfig = AdapterConfig()
    """What trains: an adapter on the model, or the model's weights."""
    data: DataConfig
    """Where prompts come from, and what they look like."""
    rollout: RolloutConfig = RolloutConfig()
    """How completions are sampled, and how many."""
    environment: EnvironmentConfig | None = None
    """An environment or agent for conversations of several turns. Without `environment` and `tools`, a completion is a
    single answer."""
    environments: dict[str, EnvironmentConfig] = {}
    """Several environments by name, instead of `environment`. The dataset's column `environment` names one for each
    row."""
    tools: tuple[ToolEntry, ...] = ()
    """Functions that the model may call, in addition to the tools of its environment. A plain text is the tool's
    `use`."""
    rewards: tuple[RewardConfig, ...] = ()
    """How completions are graded: a completion's reward is the weighted sum of these rewards and of the environment's
    own reward."""
    teacher: TeacherConfig | None = None
    """A model to learn from, with or without rewards. Default: none."""
    advantage: AdvantageConfig = AdvantageConfig()
    """How rewards become advantages."""
    loss: LossConfig = LossConfig()
    """How advantages become a loss: the variant of GRPO, the KL penalty, corrections."""
    optim: OptimConfig
    """The number of steps, the optimizer, and how updates use memory and time."""
    ranks: RanksConfig | None = None
    """Sample and train at the same time, in different processes: each step then learns from completions of the policy
    before its last update. Default: every process does both, one after the other."""
    memory: MemoryConfig = MemoryConfig()
    """How much memory the run may use."""
    eval: EvalConfig | None = None
    """Evaluation on held-out prompts. Without this section the run evaluates nothing."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often checkpoints are written, and which are kept."""
    log: LogConfig = LogConfig()
    """Where the run is logged in addition to its folder, and what is stored."""
    alarms: Annotated[AlarmsConfig | None, BeforeValidator(_off)] = AlarmsConfig()
    """When the run reports that something goes wrong, once for each kind of alarm. `off`: never."""

    @model_validator(mode="after")
    def _someone_scores(self) -> Recipe:
        if self.environment is not None and self.environments:
            raise ValueError("environment does nothing with environments: move it there, or leave out one of them")
        unused = [name for name, config in self.environments.items() if config.what is None]
        if unused:
            raise ValueError(f"environments.{unused[0]}: name a class with `use`")
        if self.environment is not None and self.environment.what is None and not self.tools:
            raise ValueError("environment.use is missing: name a class, or add tools that the model may call")
        own = self.conversations
        self._check_agents()
        weights = self._weights
        if not weights and self.teacher is None:
            raise ValueError(
                "rewards: a run needs at least one reward, such as rewards: [{use: math_answer}], or an environment "
                "with its own reward, or a teacher"
            )
        if not any(weights.values()) and self.teacher is None:
            raise ValueError(
                f"{next(iter(weights))}: every reward has weight 0, so the policy would not learn: give one a weight"
            )
        if self.advantage.turns == "turn" and not own:
            raise ValueError("advantage.turns: turn does nothing without environment or tools")
        if self.advantage.turns == "turn" and self.baseline != "group":
            raise ValueError(
                f"advantage.turns: turn compares turns within a group, so it needs advantage.baseline: group; "
                f"{self.baseline} compares whole completions"
            )
        if self.advantage.turns == "turn" and self.loss.use is None and self.loss.preset.shares_gradient:
            raise ValueError(
                f"advantage.turns: turn does nothing with loss.type {self.loss.type}: it has one ratio for a whole "
                "completion, so every token learns from the mean of all turns. Use a loss with token ratios, or "
                "gspo_token, which is gspo for advantages that differ"
            )
        return self

    def _check_agents(self) -> None:
        """Raise ValueError for settings that do nothing with agents."""
        agents = [
            f"environments.{name}" if name else "environment"
            for name, one in self.conversations.items()
            if one.is_agent
        ]
        if agents and len(agents) < len(self.conversations):
            raise ValueError(
                f"{agents[0]} is an agent, and another environment is not: use either agents or environments in a run"
            )
        if agents and self.tools:
            raise ValueError(f"tools do nothing with {agents[0]}: an agent has its own tools")
        if agents and self.advantage.turns == "turn":
            raise ValueError("advantage.turns: turn does nothing with an agent: an agent rewards a whole completion")

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.adapter.sync_reference_every is not None and self.loss.beta == 0 and self.loss.beta_end is None:
            raise ValueError("adapter.sync_reference_every does nothing while loss.beta is 0: there is no reference")
        prompts, parts = self.rollout.prompts_per_step, self.optim.num_minibatches
        if prompts % parts:
            raise ValueError(
                f"rollout.prompts_per_step must be divisible by optim.num_minibatches; got {prompts} and {parts}"
            )
        if (rows := self.rollout.prompts_per_step * self.rollout.num_generations) > MANY:
            raise ValueError(
                f"rollout.num_generations × rollout.prompts_per_step gives {rows:,} completions in a step: the maximum "
                f"is {MANY:,}"
            )
        penalised = self.loss.kl_in == "reward" or self.advantage.soft_overlong_cache is not None
        if penalised and self.baseline in ("gdpo", "maxrl"):
            raise ValueError(f"advantage.baseline {self.baseline} does not work with penalties in the reward")
        if self.rollout.dynamic_sampling and self.baseline in ("batch", "gdpo"):
            raise ValueError(self._all_teach("dynamic_sampling"))
        self._check_reuse()
        if (self.advantage.soft_overlong_cache or 0) >= self.rollout.max_completion_length:
            raise ValueError("advantage.soft_overlong_cache must be below rollout.max_completion_length")
        if "kl" in self.log.changed and self.has_penalty:
            raise ValueError("log.kl does nothing with loss.beta: with a penalty, every step reports kl")
        if self.checkpoint.metric_for_best_model is not None and self.eval is None:
            raise ValueError("checkpoint.metric_for_best_model does nothing without an eval section")
        if self.eval is not None and self.eval.source is self.eval.use is None:
            for name in sorted(self.eval.changed & {"config", "revision"}):
                check_hub_only(f"eval.{name}", self.data.source, self.data.use)
        if self.loss.preset.surrogate == "reinforce" and max(self.optim.num_iterations, self.optim.num_minibatches) > 1:
            raise ValueError(f"loss.type {self.loss.type} has no ratio: leave num_iterations and num_minibatches at 1")
        if "scale_rewards" in self.advantage.changed and self.baseline not in ("group", "leave_one_out"):
            raise ValueError(f"advantage.scale_rewards does nothing with the {self.baseline} baseline")
        return self

    def _all_teach(self, setting: str) -> str:
        """The error for a setting of `rollout` that has no groups to replace."""
        by = "" if self.advantage.baseline else f" (the default of loss.type {self.loss.type})"
        return (
            f"rollout.{setting} replaces groups whose rewards are all equal, because they teach nothing. With "
            f"advantage.baseline: {self.baseline}{by} they teach like all others: leave it out, or use another "
            "advantage.baseline, such as group"
        )

    def _check_reuse(self) -> None:
        """Raise ValueError if the loss would treat an older group as if the current policy had sampled it."""
        if not self.rollout.reuse:
            return
        if self.baseline in ("batch", "gdpo"):
            raise ValueError(self._all_teach("reuse"))
        if self.loss.use is None and self.loss.preset.surrogate == "reinforce":
            raise ValueError(
                f"rollout.reuse: loss.type {self.loss.type} has no ratio, so it would treat older completions "
                "as completions of the current policy. Use a loss with a ratio, such as dapo"
            )
        if self.loss.kl_in == "reward":
            raise ValueError(
                "rollout.reuse: with loss.kl_in: reward, the reward of an older completion would lose the KL of the "
                "policy that sampled it, not of the current policy. Use loss.kl_in: loss"
            )

    @model_validator(mode="after")
    def _solve_rates_mean_something(self) -> Recipe:
        check_graders(self.data, self.rewards)
        return self

    @model_validator(mode="after")
    def _teacher_agrees(self) -> Recipe:
        if self.teacher is None:
            return self
        replaces = [name for name in ("dynamic_sampling", "reuse") if getattr(self.rollout, name)]
        if replaces:
            raise ValueError(
                f"rollout.{replaces[0]} replaces groups whose rewards are all equal, because they teach nothing. With "
                "a teacher they teach as much as all others: leave it out"
            )
        if self.teacher.kl == "sampled" and self.loss.use is None and self.loss.preset.shares_gradient:
            raise ValueError(
                f"teacher.kl: sampled gives each token its own advantage, and loss.type {self.loss.type} has one ratio "
                "for a whole completion, so every token learns from the mean of these advantages. Use a loss with "
                "token ratios (dapo, gspo_token), or teacher.kl: exact"
            )
        if any(self._weights.values()):
            return self
        if self.advantage.changed:
            raise ValueError(f"advantage.{min(self.advantage.changed)} does nothing without a reward of nonzero weight")
        if self.loss.kl_in == "reward" and self.has_penalty:
            raise ValueError("loss.kl_in: reward does nothing without a reward of nonzero weight: leave it at loss")
        if self.data.curriculum is not None and not self._weights:
            raise ValueError(
                "data.curriculum needs a reward that tells which tasks are solved. Add a reward of weight 0, which is "
                "measured but not learned from: rewards: [{use: math_answer, weight: 0}]"
            )
        if self.eval is not None and not self._weights:
            raise ValueError(
                "eval needs a reward to measure. Add a reward of weight 0, which is measured but not learned from: "
                "rewards: [{use: math_answer, weight: 0}]"
            )
        return self

    @model_validator(mode="after")
    def _sources_and_environments_agree(self) -> Recipe:
        parts = self.data.parts
        for place, (name, data) in enumerate(parts.items()):
            setting = "data.environment" if name == "data" else f"data.sources.{place}.environment"
            if data.environment is not None and not self.environments:
                raise ValueError(f"{setting} does nothing without `environments`: it names one of them")
            if data.environment is not None and data.environment not in self.environments:
                raise ValueError(
                    f"{setting}: there is no environment {data.environment!r} in `environments`, only "
                    f"{', '.join(self.environments)}"
                )
        return self

    @model_validator(mode="after")
    def _what_training_needs(self) -> Recipe:
        if self.rollout.kv_bits and not self.loss.corrects_samplers:
            raise ValueError(
                "rollout.kv_bits makes completions differ slightly from the policy's own. Set also "
                "loss.importance_sampling_correction, such as token_truncate, which weights tokens by the difference"
            )
        return self

    @model_validator(mode="after")
    def _processes_apart_can(self) -> Recipe:
        if self.ranks is not None:
            check_apart(self.model, self.rollout, self.loss, self.teacher)
        return self

    @model_validator(mode="after")
    def _divided_models_can(self) -> Recipe:
        """Raise ValueError for settings that do not work with a model that is divided among processes."""
        if self.teacher is not None and self.teacher.model is not None and self.teacher.model.shard is not None:
            raise ValueError("teacher.model.shard: every process holds the whole teacher: leave it out")
        if self.model.shard == "fsdp":
            self._spread_models_can()
        if self.model.shard != "tensor":
            return self
        if self.adapter.type == "full":
            raise ValueError(
                "model.shard: tensor divides a base model that does not train, but with adapter.type: full it trains: "
                "use lora or dora"
            )
        if any(reward.use == "judge" for reward in self.rewards):
            raise ValueError(
                "rewards: with model.shard: tensor a single process scores, but the judge is the model that several "
                "processes share: use another reward"
            )
        if self.conversations:
            raise ValueError(
                "model.shard: tensor decodes in lockstep in several processes, but tools and environments answer at "
                "different times: leave out model.shard, or the tools and environments"
            )
        if self.optim.optimizer in ("adafactor", "muon"):
            raise ValueError(
                f"optim.optimizer: {self.optim.optimizer} needs whole matrices, but with model.shard: tensor each "
                "process has parts of them: use adamw, or another optimizer that updates each number separately"
            )
        if self.optim.moments != "float32":
            raise ValueError(
                f"optim.moments: {self.optim.moments} packs the numbers of whole arrays, but with model.shard: tensor "
                "each process has parts of them: leave it out"
            )
        return self

    def _spread_models_can(self) -> None:
        """Raise ValueError for settings that do not work with weights that are spread over processes."""
        if self.optim.gradient_checkpointing not in ("auto", True):
            raise ValueError(
                "optim.gradient_checkpointing: with model.shard: fsdp the backward pass gathers each layer again and "
                "computes it again, so all layers are checkpointed: leave it out"
            )
        if self.optim.offload_activations:
            raise ValueError(
                "optim.offload_activations: with model.shard: fsdp the inputs of layers stay on the device: leave "
                "one of them out"
            )
        if self.teacher is not None and self.teacher.in_loss:
            raise ValueError(
                f"teacher.kl: {self.teacher.kl}: with model.shard: fsdp the head is gathered only for the policy's "
                "logits: use teacher.kl: sampled"
            )
        if self.adapter.type == "full" and self.optim.optimizer in ("adafactor", "muon"):
            raise ValueError(
                f"optim.optimizer: {self.optim.optimizer} needs whole matrices, but with model.shard: fsdp and "
                "adapter.type: full each process has parts of them: use adamw, or another optimizer that updates each "
                "number separately"
            )

    @property
    def _weights(self) -> dict[str, float]:
        """The weight of each reward, environments' own rewards included, by the setting of the weight."""
        weights = {f"rewards.{place}.weight": reward.weight for place, reward in enumerate(self.rewards)}
        for name, one in self.conversations.items():
            if one.what:
                weights[f"environments.{name}.weight" if name else "environment.weight"] = one.weight
        return weights

    @property
    def uses(self) -> list[str]:
        """The code that the recipe names: its rewards, loss, sampler of tasks, environments, tools and loggers."""
        environments = [code for config in self.conversations.values() for code in config.code]
        tools = [tool.use for tool in self.tools]
        samplers = dict.fromkeys(data.sampler for data in self.data.parts.values())
        named = filter(None, [self.loss.use, *samplers, *environments, *tools])
        return [*(reward.use for reward in self.rewards), *named, *self.log.use]

    @property
    def conversations(self) -> dict[str, EnvironmentConfig]:
        """The settings of conversations by the value of the column `environment`; a single environment has the name "".

        Empty if a completion is a single answer.
        """
        if self.environments:
            return self.environments
        alone = self.environment or (EnvironmentConfig() if self.tools else None)
        return {} if alone is None else {"": alone}

    @property
    def best_metric(self) -> str:
        """The evaluation metric that selects the best checkpoint."""
        assert self.eval is not None
        return self.checkpoint.metric_for_best_model or f"avg@{self.eval.samples}"

    @property
    def has_penalty(self) -> bool:
        """Whether the loss or the reward has a penalty for distance from the reference."""
        return self.loss.beta > 0 or bool(self.loss.beta_end)

    @property
    def kl_every(self) -> int | None:
        """Steps between measurements of the distance from the reference, if no penalty reports it."""
        if self.has_penalty:
            return None
        if self.log.kl == "auto":
            return None if self.adapter.type == "full" else 10
        return self.log.kl

    @property
    def needs_reference(self) -> bool:
        """Whether anything is computed under the reference."""
        return self.has_penalty or self.kl_every is not None

    @property
    def baseline(self) -> Baseline:
        """The baseline of advantages: `advantage.baseline`, or the default of `loss.type`."""
        return self.advantage.baseline or self.loss.preset.baseline


class EvaluationRecipe(Recipe):
    """A recipe for evaluation without training: settings that only training needs may be missing."""

    @model_validator(mode="after")
    def _what_training_needs(self) -> EvaluationRecipe:
        return self
