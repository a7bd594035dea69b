"""The schema of a recipe: every setting with its meaning, its bounds and its default.

`grpo.recipes` reads a file into the schema, and `grpo recipes schema` prints it. Sections are frozen and strict: an
unknown key or a value of another type is an error. The docstrings below the fields are the settings' public
descriptions.
"""

from grpo.config.alarms import AlarmsConfig as AlarmsConfig
from grpo.config.curriculum import CurriculumConfig as CurriculumConfig
from grpo.config.data import FILE_TYPES as FILE_TYPES
from grpo.config.data import DataConfig as DataConfig
from grpo.config.data import EvalConfig as EvalConfig
from grpo.config.environment import EnvironmentConfig as EnvironmentConfig
from grpo.config.environment import ToolConfig as ToolConfig
from grpo.config.judge import JudgeConfig as JudgeConfig
from grpo.config.log import CheckpointConfig as CheckpointConfig
from grpo.config.log import CompletionsConfig as CompletionsConfig
from grpo.config.log import LogConfig as LogConfig
from grpo.config.log import TrackioConfig as TrackioConfig
from grpo.config.log import WandbConfig as WandbConfig
from grpo.config.memory import MemoryConfig as MemoryConfig
from grpo.config.model import AdapterConfig as AdapterConfig
from grpo.config.model import ModelConfig as ModelConfig
from grpo.config.objective import AdvantageConfig as AdvantageConfig
from grpo.config.objective import LossConfig as LossConfig
from grpo.config.optim import OptimConfig as OptimConfig
from grpo.config.ranks import RanksConfig as RanksConfig
from grpo.config.recipe import EvaluationRecipe as EvaluationRecipe
from grpo.config.recipe import Recipe as Recipe
from grpo.config.rewardmodel import RewardModelConfig as RewardModelConfig
from grpo.config.rewards import RewardConfig as RewardConfig
from grpo.config.rollout import RolloutConfig as RolloutConfig
from grpo.config.sources import SourceConfig as SourceConfig
from grpo.config.teacher import TeacherConfig as TeacherConfig
