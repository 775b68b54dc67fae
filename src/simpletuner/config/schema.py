"""The configuration of a run. Every option is declared once, in its section; names are unique."""

from __future__ import annotations

from pydantic import Field

from simpletuner.config.option import OptionSection
from simpletuner.config.sections_data import CacheOptions, DataOptions
from simpletuner.config.sections_distributed import DistributedOptions
from simpletuner.config.sections_flow import FlowOptions
from simpletuner.config.sections_model import AdapterOptions, ModelOptions
from simpletuner.config.sections_output import (
    LoggingOptions,
    PublishingOptions,
    ValidationOptions,
)
from simpletuner.config.sections_preservation import PreservationOptions
from simpletuner.config.sections_training import (
    CheckpointOptions,
    OptimizerOptions,
    TrainingOptions,
)
from simpletuner.config.sections_tuning import TuningOptions

__all__ = [
    "AdapterOptions",
    "CacheOptions",
    "CheckpointOptions",
    "DataOptions",
    "DistributedOptions",
    "FlowOptions",
    "LoggingOptions",
    "ModelOptions",
    "OptimizerOptions",
    "PreservationOptions",
    "PublishingOptions",
    "RunConfig",
    "TrainingOptions",
    "TuningOptions",
    "ValidationOptions",
    "trigger_word",
]


class RunConfig(OptionSection):
    """All options of a run.

    `config.load` fills it and checks the rules between sections: exactly one of max_train_steps and
    num_train_epochs is set, and the paths of existing input files are absolute.
    """

    model: ModelOptions = Field(default_factory=ModelOptions)
    adapter: AdapterOptions = Field(default_factory=AdapterOptions)
    data: DataOptions = Field(default_factory=DataOptions)
    cache: CacheOptions = Field(default_factory=CacheOptions)
    flow: FlowOptions = Field(default_factory=FlowOptions)
    preservation: PreservationOptions = Field(default_factory=PreservationOptions)
    optimizer: OptimizerOptions = Field(default_factory=OptimizerOptions)
    training: TrainingOptions = Field(default_factory=TrainingOptions)
    distributed: DistributedOptions = Field(default_factory=DistributedOptions)
    checkpoint: CheckpointOptions = Field(default_factory=CheckpointOptions)
    tuning: TuningOptions = Field(default_factory=TuningOptions)
    validation: ValidationOptions = Field(default_factory=ValidationOptions)
    logging: LoggingOptions = Field(default_factory=LoggingOptions)
    publishing: PublishingOptions = Field(default_factory=PublishingOptions)


def trigger_word(run: RunConfig) -> str | None:
    """Return the word or phrase that stands for the trained concept, where one is given."""
    given = run.publishing.modelspec_trigger or run.data.instance_prompt
    return given.strip() if isinstance(given, str) and given.strip() else None
