"""Turns a recipe into everything that a run needs, and checks it in the order that finds mistakes most cheaply."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.nn as nn

from grpo.backend import cuda
from grpo.backend.device import limit_memory, on_gpu, setup
from grpo.backend.launched import PATIENCE
from grpo.backend.random import derive_key
from grpo.backend.ranks import Ranks
from grpo.config import OptimConfig, Recipe, RolloutConfig
from grpo.data.prompts import PromptRenderer
from grpo.data.rows import Rows
from grpo.data.streaming import Streamed
from grpo.environments.conversations import Conversations
from grpo.errors import UserError
from grpo.evaluation.evaluator import Evaluator
from grpo.generation.controller import speculation_of
from grpo.generation.generator import Generator
from grpo.model.adapters import Adapters
from grpo.model.fsdp import Spread
from grpo.model.load import head_note, load
from grpo.model.mlxlm import TokenizerWrapper
from grpo.model.offloading import vault_of
from grpo.model.policy import Policy
from grpo.model.trial import check_divided
from grpo.planning.graders import Graders
from grpo.planning.lesson import NONE, TeacherNeeds
from grpo.planning.notes import filter_note, layers_note, notes_on
from grpo.planning.plan import Plan
from grpo.planning.planner import Planner, allowed, decode_as_planned
from grpo.planning.positions import position_note
from grpo.planning.workload import Workload
from grpo.plugins import file_in, locate_reward
from grpo.recipes import with_settings
from grpo.rollout import RolloutEngine, sampling_of
from grpo.runs.agents import AgentsByName
from grpo.runs.drawing import seed_of, source_of
from grpo.runs.feed import Feed, first_of, lengths_of, longest_of
from grpo.runs.given import NOTHING, Given
from grpo.runs.partners import Partners, invite, with_sources
from grpo.runs.processes import notes_of_processes, one_plan, roles_of, untimed, updating
from grpo.runs.rewarding import check_rewarded, check_sources_rewarded
from grpo.runs.sections import applying_of, data_of, text_system
from grpo.runs.teachers import teacher_of
from grpo.scoring.scorer import Scorer
from grpo.training.algorithms import make_optimizer
from grpo.training.apart import ApartTrainer
from grpo.training.roles import Roles
from grpo.training.teaching import Teacher
from grpo.training.trainer import Trainer
from grpo.types import Task

PEEK = 64
"""Number of prompts from the start of the data that are available to check decoding against training."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is ready to start: trainer, evaluator (None without `eval`), plan, planner, first tasks, notes, data.

    `rows` are the rows of each source of tasks, and of `eval` if there is that section, by name (`data_of`). Closing
    `opened` ends the processes of rewards and environments.
    """

    trainer: Trainer
    evaluator: Evaluator | None
    plan: Plan
    planner: Planner
    tasks: list[Task]
    notes: list[str]
    rows: Mapping[str, Rows | Streamed]
    opened: ExitStack


def prepare(cfg: Recipe, given: Given = NOTHING, trains: bool = True, alone: bool = False) -> Prepared:
    """Load rewards, data and model, and make a trainer from them. Writes nothing.

    Objects that are `given` replace what the recipe names. Without `trains` the run is only evaluated: no teacher is
    loaded, and the trainer cannot make steps. `alone`: this process does the work of all `ranks` of the recipe.

    Raises UserError for anything in the recipe that does not exist or does not fit.
    """
    setup()
    ranks = Ranks.launched()
    limit_memory(ranks.checked(lambda: None if cfg.memory.limit_gb is None else allowed(cfg.memory.limit_gb)))
    if cfg.model.shard == "tensor":
        ranks = ranks.divided(cfg.model.shard_size)
    elif cfg.model.shard == "fsdp":
        ranks.spread = ranks.divided(cfg.model.shard_size)
    roles = roles_of(cfg.ranks if trains else None, ranks, alone)
    waited = PATIENCE if roles else 0.0  # time for a whole rollout phase or update of another process
    ranks.expect(waited + max((one.most_seconds for one in cfg.conversations.values()), default=0.0))
    sampling = roles.samplers if roles else ranks.size
    if cfg.rollout.prompts_per_step < sampling:
        raise UserError(
            f"rollout.prompts_per_step: {cfg.rollout.prompts_per_step} is too few for {sampling} processes: "
            "each samples at least one prompt"
        )
    make_optimizer(cfg.optim)  # raises for arguments that the optimizer does not have
    vault_of(cfg.optim.offload_activations)  # raises on machines where offloading has no use
    with ExitStack() as opened:
        files = [Path(file) for reward in cfg.rewards if (file := file_in(reward.use))]
        groups = -(-cfg.rollout.prompts_per_step // sampling)
        partners = invite(cfg.conversations, cfg.tools, given, groups, files)
        opened.callback(partners.close)
        rewarding = check_rewarded(cfg.rewards, cfg.advantage, partners, taught=cfg.teacher is not None)
        hosts = list(partners.hosts.values())
        applies = applying_of(cfg, [reward.name or locate_reward(reward.use).name for reward in cfg.rewards])
        system, steps = text_system(cfg), cfg.optim.steps
        scorer = Scorer.of(cfg.rewards, steps, system, given.functions, hosts, applies)
        opened.callback(scorer.close)
        check_sources_rewarded(list(cfg.data.parts), scorer, taught=cfg.teacher is not None)
        prepared = _prepared(cfg, given, ranks, roles, partners, scorer, trains)
        taught = [cfg.teacher.describe()] if cfg.teacher and trains else []
        return replace(prepared, notes=[*taught, *prepared.notes, *rewarding], opened=opened.pop_all())


def _prepared(
    cfg: Recipe, given: Given, ranks: Ranks, roles: Roles | None, partners: Partners, scorer: Scorer, trains: bool
) -> Prepared:
    """The rest of `prepare`. The caller sets `opened` of the result."""
    custom_loss = given.function(cfg.loss.use, "loss") if cfg.loss.use else None
    named = data_of(cfg)
    local = {name: given.rows(name, data) for name, data in named.items() if given.is_local(name, data)}
    model, tokenizer = load(cfg.model, ranks.shard)
    rows = {name: local[name] if name in local else given.rows(name, data) for name, data in named.items()}
    policy = _policy(cfg, model, ranks)
    teacher = teacher_of(cfg.teacher if trains else None, cfg.adapter, policy, tokenizer)
    generator = Generator(model, tokenizer, cfg.rollout.max_concurrency, cfg.rollout.kv_bits)
    rollout = untimed(cfg.rollout, ranks)
    generator.speculation, generator.neighbours = speculation_of(rollout.speculate), ranks.neighbours
    _check_stop_ids(cfg.rollout, vocabulary := generator.decoding.vocabulary)
    shown = partners.tools, partners.resets, text_system(cfg) is None or partners.are_agents
    readers = {name: PromptRenderer(data, tokenizer, vocabulary, name, *shown) for name, data in named.items()}
    feeds = [Feed(name, rows[name], readers[name]) for name in cfg.data.parts]
    held_out = Feed("eval", rows["eval"], readers["eval"]) if cfg.eval is not None else None
    tasks = first_of(feeds, PEEK, scorer, partners)
    keeps, renderer = scorer.lends_environments, feeds[0].renderer
    environment, talk = partners.environment(
        tokenizer, renderer, tasks[0], cfg.rollout, cfg.seed, keeps, cfg.model.name
    )
    engine = RolloutEngine(generator, sampling_of(cfg.rollout), environment)
    evaluator = _evaluator(cfg, held_out, engine, scorer, ranks) if held_out else None
    if evaluator is not None:
        partners.check("eval", evaluator.tasks)
    if isinstance(environment, Conversations):
        with_sources(environment, readers, text_system(cfg))
        ranks.checked(lambda: partners.check_beginnings(environment, tasks))
    elif isinstance(environment, AgentsByName):
        environment.prompts_like(readers)
    lengths = lengths_of(feeds, ranks)
    longest, own = longest_of(feeds, lengths, partners)
    own += environment.tail(tasks[0]) if isinstance(environment, Conversations) else 0
    streams = {feed.name: feed.stream(seed_of(cfg.data, feed.name, cfg.seed)) for feed in feeds}
    source = source_of(cfg.data, given, streams, scorer, cfg.seed)
    longest_of_all = _longest_of_all(longest, evaluator)
    positions = position_note(model, longest_of_all, cfg.rollout.max_completion_length)
    sections = _readable(cfg.optim, teacher), rollout, cfg.adapter, cfg.eval
    workload = Workload(*sections, longest, longest_of_all, own, environment is not None, *updating(ranks, roles))
    lesson = _needs(teacher, model)
    graders = _graders(scorer, policy, tokenizer)
    planner = Planner(workload, policy, generator.decoding, cfg.memory.limit_gb, cfg.loss, lesson, graders)
    plan, optim, needs = one_plan(ranks, policy, *ranks.checked(planner.plan), roles.trainers if roles else None)
    cfg = with_settings(cfg, {"optim": optim})
    decode_as_planned(generator, plan)
    parts = cfg, policy, source, engine, scorer, custom_loss
    trainer = ApartTrainer(roles, *parts) if roles else Trainer(*parts, ranks, teacher)
    trainer.update.gradients.alone = plan.alone
    prompts = [note for feed, known in zip(feeds, lengths, strict=True) for note in feed.notes(known, partners)]
    head = filter(None, [positions, head_note(model, cfg.model)])
    notes = [*talk, *prompts, *generator.describe(), *head, *policy.notes, *(teacher.notes if teacher else [])]
    notes += [*_of_filters(cfg, engine), *notes_on(cfg.optim, cfg.rollout, cfg.adapter, cfg.loss)]
    held_out_note = held_out.null_prompts() if held_out else None
    notes += filter(None, [held_out_note, layers_note(cfg.optim, len(model.layers)), trainer.update.optimizer.note])
    notes += notes_of_processes(ranks, roles, cfg.rollout, plan.slots, needs)
    return Prepared(trainer, evaluator, plan, planner, tasks, list(dict.fromkeys(notes)), rows, ExitStack())


def _of_filters(cfg: Recipe, engine: RolloutEngine) -> list[str]:
    """The note on sampling filters, if the recipe has any."""
    return [filter_note(cfg.loss)] if engine.sampling.reshaped else []


def _needs(teacher: Teacher | None, model: nn.Module) -> TeacherNeeds:
    """The memory that a teacher needs on this machine."""
    if teacher is None:
        return NONE
    return TeacherNeeds.of(teacher.cfg, model, teacher.model, on_gpu(), cuda.available())


def _readable(optim: OptimConfig, teacher: Teacher | None) -> OptimConfig:
    """The section without packed completions if the teacher cannot read packed lines: a batch that is planned for
    packed lines would be many times larger in rows."""
    if not (on_gpu() and optim.pack_completions) or teacher is None or teacher.packs:
        return optim
    return with_settings(optim, {"pack_completions": False})


def _policy(cfg: Recipe, model: nn.Module, ranks: Ranks) -> Policy:
    """The policy of a model; adds the adapter to the model.

    Raises UserError for a divided model whose gradients differ between processes.
    """
    adapters = Adapters(model, cfg.adapter, derive_key(cfg.seed, "adapter"), cfg.needs_reference, ranks.shard)
    check_divided(model, ranks.shard)
    vault = vault_of(cfg.optim.offload_activations)
    policy = Policy(model, adapters, cfg.rollout.temperature, cfg.optim.share_prompts, vault=vault)
    if (spread := ranks.spread) is not None:
        policy.spread = Spread(model, adapters, policy.split and policy.split[1], spread.shard, spread)
    return policy


def _graders(scorer: Scorer, policy: Policy, tokenizer: TokenizerWrapper) -> Graders:
    """The models among the rewards, for the plan. Binds judges to the policy.

    Raises UserError for a judge's labels that the tokenizer does not distinguish.
    """
    for judge in scorer.judges:
        judge.bind(policy, tokenizer)
    models = [(one.classifier.model, one.cfg) for one in scorer.models.values()]
    return Graders.of([*models, *((policy.model, judge.cfg) for judge in scorer.judges)], cuda.available())


def _evaluator(cfg: Recipe, feed: Feed, engine: RolloutEngine, scorer: Scorer, ranks: Ranks) -> Evaluator:
    """The evaluator on held-out rows. Raises UserError if it does not measure `checkpoint.metric_for_best_model`."""
    assert cfg.eval is not None
    tasks = feed.first(cfg.eval.prompts)
    evaluator = Evaluator(cfg.eval, tasks, engine, scorer, cfg.rollout.temperature, cfg.seed, ranks)
    if cfg.best_metric not in evaluator.names:
        known = ", ".join(evaluator.names)
        raise UserError(f"checkpoint.metric_for_best_model: {cfg.best_metric!r} is not measured; choose one of {known}")
    return evaluator


def _check_stop_ids(rollout: RolloutConfig, vocabulary: int) -> None:
    """Raise UserError for a stop token that the model cannot sample."""
    if odd := [token for token in rollout.stop_token_ids if token >= vocabulary]:
        raise UserError(f"rollout.stop_token_ids: {odd[0]} is not in the model's vocabulary of {vocabulary} tokens")


def _longest_of_all(trained: int, evaluator: Evaluator | None) -> int:
    """Tokens of the longest prompt to sample from: training prompts of up to `trained` tokens, and held-out prompts."""
    held_out = evaluator.tasks if evaluator else ()
    return max([trained, *(len(task.prompt_ids) for task in held_out)])
