"""Sections about how the model is trained: optimizer, training, checkpoint."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from simpletuner.config import optimizer_names
from simpletuner.config.option import Effect, Not, OptionSection, option

# Read this file as a table: name, type and default; one sentence of help; level, bounds, other
# names, and the relations to other options.

ADAM_OPTIMIZERS = ("adamw", "adamw_bf16", "adamw_8bit", "prodigy", "adamw_schedulefree", "muon")
EMA = {"use_ema": True}
RateFactor = Annotated[float, Field(gt=0, le=1000)]


class OptimizerOptions(OptionSection):
    """Optimizer and learning rate."""

    optimizer: Literal[
        "adamw",
        "adamw_bf16",
        "adamw_8bit",
        "adafactor",
        "lion",
        "prodigy",
        "adamw_schedulefree",
        "muon",
    ] = option(
        "adamw",
        "Optimizer. For full-rank training adamw_bf16 needs 4 bytes of state per weight and rounds "
        "stochastically, adamw_8bit needs 2 bytes, and muon learns in fewer steps.",
        level="basic",
        value_aliases=optimizer_names.OPTIMIZER_ALIASES,
        refused_values=optimizer_names.REFUSED_OPTIMIZERS,
    )
    optimizer_config: str | None = option(
        None, "More arguments of the optimizer: key=value,key=value."
    )
    learning_rate: float = option(1e-4, "Learning rate.", level="basic", affects=set(), gt=0, le=10)
    adam_beta1: float = option(
        0.9,
        "Decay of the running mean of the gradient.",
        aliases=("optimizer_beta1",),
        needs={"optimizer": ADAM_OPTIMIZERS},
        affects=set(),
        ge=0,
        lt=1,
    )
    adam_beta2: float = option(
        0.999,
        "Decay of the running mean of the squared gradient.",
        aliases=("optimizer_beta2",),
        needs={"optimizer": ADAM_OPTIMIZERS},
        affects=set(),
        ge=0,
        lt=1,
    )
    adam_weight_decay: float = option(
        0.01,
        "Weight decay.",
        level="common",
        aliases=("optimizer_weight_decay",),
        affects=set(),
        ge=0,
        le=10,
    )
    adam_epsilon: float = option(
        1e-8,
        "Added to the denominator for numerical stability.",
        needs={"optimizer": ADAM_OPTIMIZERS},
        affects=set(),
        gt=0,
        le=1,
    )
    lr_scheduler: Literal["constant", "linear", "cosine", "polynomial"] = option(
        "constant",
        "Learning-rate schedule after warmup, over the whole run.",
        level="basic",
        value_aliases={"constant_with_warmup": "constant", "cosine_with_warmup": "cosine"},
        affects=set(),
    )
    lr_warmup_steps: int = option(
        0,
        "Warmup: steps in which the learning rate rises from 0.",
        level="common",
        unit="steps",
        affects=set(),
        ge=0,
    )
    lr_end: float = option(
        0.0,
        "Learning rate at the end of the run, for linear, cosine and polynomial.",
        needs={"lr_scheduler": ("linear", "cosine", "polynomial")},
        affects=set(),
        ge=0,
        le=10,
    )
    lr_power: float = option(
        1.0,
        "Exponent of the polynomial schedule.",
        needs={"lr_scheduler": "polynomial"},
        affects=set(),
        gt=0,
        le=100,
    )
    lr_scale: bool = option(
        False,
        "Multiply the learning rate by the number of samples per optimizer step.",
        affects=set(),
    )
    lr_scale_sqrt: bool = option(
        False,
        "Multiply the learning rate by the square root of the number of samples per optimizer "
        "step.",
        affects=set(),
    )
    lr_by_module: dict[str, RateFactor] | None = option(
        None,
        "Factors on the learning rate by module: an object of regular expressions for whole module "
        'names, such as {"single_transformer_blocks.*": 0.5}; the first that matches counts, other '
        "modules have factor 1.",
        # A plan looks for the modules, so that a wrong pattern is found before any download.
        affects={"step", "plan"},
    )
    loraplus_lr_ratio: float | None = option(
        None,
        "LoRA+: learning rate of B divided by that of A; null is 1, the same rate for both.",
        needs={"model_type": "lora", "lora_type": "standard"},
        unmet_errors={
            "model_type": 'needs model_type "lora"',
            "lora_type": "applies to a standard LoRA only, which has factors A and B",
        },
        affects=set(),
        gt=0,
        le=1000,
    )
    max_grad_norm: float = option(1.0, "Gradient clipping limit; 0 is off.", level="common", ge=0)
    grad_clip_method: Literal["norm", "value"] = option(
        "norm",
        "Clip the norm of the whole gradient, or each element (value).",
        needs={"max_grad_norm": Not(0)},
    )
    optimizer_release_gradients: bool = option(
        False,
        "Optimizer step in backward: update each weight as soon as its gradient is computed, and "
        "free the gradient. Same numbers, no memory for gradients. Needs "
        "gradient_accumulation_steps 1 and no clipping by norm.",
        level="common",
        resume_policy="free",
    )
    optimizer_cpu_offload_method: Literal["none", "states"] = option(
        "none",
        "Keep optimizer states in host memory and copy them to the GPU one weight at a time "
        "(states): same numbers, slower steps. No effect on devices that share the host's memory.",
        level="common",
        resume_policy="free",
        value_aliases={"torchao": "states"},
        affects={"plan"},
    )
    use_ema: bool = option(
        False,
        "Also keep an exponential moving average (EMA) of the weights.",
        level="common",
        affects={"plan"},
    )
    ema_decay: float = option(
        0.995, "Decay of the EMA at each update.", needs=EMA, affects=set(), ge=0, lt=1
    )
    ema_update_interval: int = option(
        1, "Steps between updates of the EMA.", unit="steps", needs=EMA, affects=set(), ge=1
    )
    ema_device: Literal["auto", "cpu", "accelerator"] = option(
        "auto",
        "Device that holds the EMA weights; auto is the accelerator for a LoRA, and the CPU for "
        "all weights of the transformer.",
        resume_policy="free",
        needs=EMA,
        affects={"plan"},
    )
    ema_validation: Literal["comparison", "ema_only", "none"] = option(
        "comparison",
        "Validation images from both sets of weights (comparison), from the EMA weights "
        "(ema_only), or from the trained weights (none).",
        resume_policy="free",
        needs=EMA,
        affects=set(),
    )


class TrainingOptions(OptionSection):
    """Length and batch size."""

    output_dir: str = option(
        "simpletuner-results",
        "Run folder: all results of the run are written here.",
        level="basic",
        resume_policy="free",
        path="new",
        affects=set(),
        min_length=1,
    )
    seed: int = option(42, "Random seed.", level="basic", affects=set(), ge=0, lt=2**63)
    train_batch_size: int = option(
        1,
        "Batch size per step.",
        level="basic",
        unit="images",
        affects={"plan"},
        ge=1,
        le=1024,
    )
    gradient_accumulation_steps: int = option(
        1,
        "Batches of each process per optimizer step.",
        level="common",
        # Compared together with the number of processes: training/resume.py.
        resume_policy="free",
        unit="batches",
        ge=1,
        le=4096,
    )
    max_train_steps: int | None = option(
        None,
        "Number of optimizer steps. Defaults to 1000 if neither this nor num_train_epochs is set.",
        level="basic",
        unit="steps",
        resume_policy="free",
        zero_is_null=True,
        affects=set(),
        ge=1,
    )
    num_train_epochs: int | None = option(
        None,
        "Number of epochs (passes over the data), instead of max_train_steps.",
        level="basic",
        unit="epochs",
        resume_policy="free",
        zero_is_null=True,
        affects=set(),
        ge=1,
    )
    nonfinite_loss_patience: int = option(
        0,
        "Number of steps in a row with a NaN or infinite loss that may be skipped before the run "
        "stops.",
        unit="steps",
        resume_policy="free",
        affects=set(),
        ge=0,
    )


class CheckpointOptions(OptionSection):
    """Checkpoints and resuming."""

    shared_affects: ClassVar[frozenset[Effect]] = frozenset()

    resume_from_checkpoint: str = option(
        "latest",
        "latest: resume if a checkpoint exists; must: fail if there is none; never: start over; "
        "or the path of a checkpoint.",
        level="common",
        resume_policy="free",
        path="new",
        min_length=1,
    )
    resume_with_changes: bool = option(
        False,
        "Resume although options, images, captions or base weights differ from the checkpoint: "
        "take the new ones, and record each change in the history of the run.",
        level="common",
        resume_policy="free",
    )
    checkpoint_step_interval: int = option(
        500,
        "Steps between checkpoints.",
        level="basic",
        unit="steps",
        resume_policy="free",
        aliases=("checkpointing_steps",),
        ge=1,
    )
    checkpoint_epoch_interval: int | None = option(
        None,
        "Also save a checkpoint after every n-th epoch.",
        unit="epochs",
        resume_policy="free",
        ge=1,
    )
    checkpoints_total_limit: int = option(
        5,
        "Maximum number of checkpoints; older ones are deleted.",
        level="common",
        unit="checkpoints",
        resume_policy="free",
        aliases=("save_total_limit",),
        affects={"plan"},
        ge=1,
    )
