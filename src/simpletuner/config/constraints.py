"""Rules between options: errors for contradictions, warnings for probable mistakes.

An option that has an effect only with certain values of others declares that itself (`needs`, see
config/option.py); here are the rules that compare values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from simpletuner.config import flow_constraints, lycoris_config, preservation_constraints
from simpletuner.config.deepspeed_config import find_deepspeed_notices
from simpletuner.config.distributed_constraints import find_distributed_errors
from simpletuner.config.optimizer_arguments import parse_optimizer_arguments
from simpletuner.config.optimizer_names import STOCHASTIC_OPTIMIZERS
from simpletuner.config.option import (
    NeedGroup,
    ValueReader,
    describe_needs,
    find_unmet_need,
    format_value,
    join_words,
)
from simpletuner.config.option_catalog import Option, all_options
from simpletuner.config.patterns import pattern_problem
from simpletuner.config.schema import DataOptions, RunConfig
from simpletuner.config.tuning_constraints import find_tuning_errors
from simpletuner.config.validation_constraints import find_validation_errors
from simpletuner.errors import ConfigError
from simpletuner.events.tracker_names import TRACKER_NAMES

GivenOrigins = Mapping[str, str]  # option -> where it was given; defaults are absent
ConstraintFinding = tuple[str, str]  # the option that is reported, and what is wrong
# These initialise A and B from the base's principal components, so the delta is not zero at the
# start.
BASE_DERIVED_INITS = ("olora", "pissa")
# A gradient of the velocity error is about 1e-6 per element; below 6e-5 fp16 loses precision.
FP16_REFUSAL = (
    'mixed_precision = "fp16": training needs bf16 or no; fp16 rounds small gradients to zero and '
    "overflows in Chroma's activations. GPUs without bf16 units can compute bf16 too, more slowly"
)


def find_errors(run: RunConfig, given: GivenOrigins) -> Iterator[ConstraintFinding]:
    """Yield every reason why these options cannot be used together."""
    reported: set[str] = set()
    for name, reason in _compare_values(run, given):
        reported.add(name)
        yield name, reason
    for option, group in _find_ineffective(run):
        refusal = unmet_error(option, group)
        if refusal and option.name not in reported:
            yield option.name, refusal


def _compare_values(run: RunConfig, given: GivenOrigins) -> Iterator[ConstraintFinding]:
    model, training = run.model, run.training
    if training.max_train_steps and training.num_train_epochs:
        yield (
            "max_train_steps",
            "num_train_epochs is given too; set the length of the run with one of them",
        )
    if model.base_model_default_dtype == "bf16" and model.mixed_precision != "bf16":
        yield (
            "base_model_default_dtype",
            f"bf16 weights cannot be used with mixed_precision {model.mixed_precision}",
        )
    yield from _check_block_swap(run)
    yield from _check_adapter(run)
    yield from _check_learning_rate(run)
    yield from _check_optimizer_memory(run)
    try:
        parse_optimizer_arguments(run.optimizer)
    except ConfigError as error:
        yield "optimizer_config", str(error)
    yield from check_sizes_and_captions(run.data)
    yield from flow_constraints.find_errors(run.flow, given)
    yield from preservation_constraints.find_errors(run)
    yield from find_validation_errors(run)
    yield from find_tuning_errors(run)
    yield from _check_logging(run)
    yield from find_distributed_errors(run)


def _check_adapter(run: RunConfig) -> Iterator[ConstraintFinding]:
    adapter = run.adapter
    if adapter.lora_type == "lycoris":
        try:
            parsed = lycoris_config.require_lycoris_config(adapter)
            problem, _ = lycoris_config.find_class_problems(parsed, run.model.model_family)
            if problem:
                yield "lycoris_config", problem
            if parsed.preset is not None and adapter.lora_target_modules is not None:
                yield (
                    "lora_target_modules",
                    "apply_preset in lycoris_config chooses the modules too; use one of them",
                )
        except ConfigError as error:
            yield "lycoris_config", str(error)
    if (
        adapter.use_dora
        and adapter.lora_format in ("kohya", "comfyui")
        and adapter.lora_type == "standard"
    ):
        yield (
            "lora_format",
            f"{adapter.lora_format} cannot hold a DoRA, because ComfyUI, Forge and kohya's tools "
            "scale the "
            'magnitudes differently; use "none", or turn use_dora off',
        )
    derived = adapter.lora_init_type in BASE_DERIVED_INITS
    if derived and adapter.use_dora:
        yield (
            "lora_init_type",
            f"{adapter.lora_init_type} cannot be combined with use_dora, because no file can "
            "express the "
            'result on the unchanged base; use "default"',
        )
    if derived and adapter.init_lora is not None:
        yield (
            "init_lora",
            "and lora_init_type both specify the initial values of A and B; remove one of them",
        )
    for pattern in adapter.lora_rank_by_module or {}:
        if problem := pattern_problem(pattern):
            yield "lora_rank_by_module", f"{pattern!r} {problem}"
    if isinstance(adapter.lora_target_modules, str):
        problem = pattern_problem(adapter.lora_target_modules)
        if problem:
            yield "lora_target_modules", problem


def _check_learning_rate(run: RunConfig) -> Iterator[ConstraintFinding]:
    optimizer = run.optimizer
    if optimizer.lr_scale and optimizer.lr_scale_sqrt:
        yield "lr_scale_sqrt", "lr_scale is given too; use one of them"
    if optimizer.lr_end > optimizer.learning_rate and optimizer.lr_scheduler != "constant":
        yield "lr_end", f"{optimizer.lr_end:g} is above learning_rate {optimizer.learning_rate:g}"
    for name in ("lr_by_module", "loraplus_lr_ratio"):
        if getattr(optimizer, name) is not None:
            yield from _check_several_rates(run, name)
    for pattern in optimizer.lr_by_module or {}:
        if problem := pattern_problem(pattern):
            yield "lr_by_module", f"{pattern!r} {problem}"
    if optimizer.optimizer == "adamw_schedulefree" and optimizer.lr_scheduler != "constant":
        yield (
            "lr_scheduler",
            'adamw_schedulefree replaces the learning-rate schedule; use "constant"',
        )


def _check_several_rates(run: RunConfig, name: str) -> Iterator[ConstraintFinding]:
    """Yield what cannot be used with learning rates that differ between parameters."""
    if run.optimizer.optimizer == "prodigy":
        yield name, "prodigy estimates one rate for all weights; use another optimizer"
    if run.distributed.deepspeed_config is not None:
        yield (
            name,
            "deepspeed_config joins all weights into one tensor, which has one rate; use "
            "fsdp_enable, or leave one of them out",
        )


def _check_block_swap(run: RunConfig) -> Iterator[ConstraintFinding]:
    swapped, checkpointed = run.model.musubi_blocks_to_swap, run.model.gradient_checkpointing
    if swapped > 1 and swapped != int(swapped):
        yield (
            "musubi_blocks_to_swap",
            f"{swapped:g} is neither a whole number of blocks nor a fraction below 1",
        )
    if not isinstance(checkpointed, (bool, str)) and swapped > checkpointed:
        yield (
            "musubi_blocks_to_swap",
            f"{swapped:g} blocks cannot be swapped when gradient_checkpointing is "
            f"{checkpointed}, because swapped blocks must be checkpointed; raise "
            "gradient_checkpointing",
        )


def _check_optimizer_memory(run: RunConfig) -> Iterator[ConstraintFinding]:
    """Yield what an optimizer step in backward, or offloaded states, cannot be combined with."""
    optimizer, accumulation = run.optimizer, run.training.gradient_accumulation_steps
    in_backward = optimizer.optimizer_release_gradients
    offloaded = optimizer.optimizer_cpu_offload_method != "none"
    if in_backward and accumulation > 1:
        yield (
            "optimizer_release_gradients",
            f"gradients cannot be accumulated over {accumulation} batches "
            "(gradient_accumulation_steps) when each is used and freed in the backward pass; "
            "use 1, and a larger train_batch_size if it fits",
        )
    if in_backward and optimizer.max_grad_norm > 0 and optimizer.grad_clip_method == "norm":
        yield (
            "optimizer_release_gradients",
            f"max_grad_norm {optimizer.max_grad_norm:g} clips a norm that is known only after "
            "the whole "
            'backward pass; use max_grad_norm 0, or grad_clip_method "value"',
        )
    single_weights = {
        "optimizer_release_gradients": in_backward,
        "optimizer_cpu_offload_method": offloaded,
    }
    for name, used in single_weights.items():
        if used and optimizer.optimizer == "prodigy":
            yield (
                name,
                "prodigy estimates its learning rate from all weights together; use another "
                "optimizer",
            )
    if offloaded and optimizer.optimizer == "adamw_schedulefree":
        yield (
            "optimizer_cpu_offload_method",
            "adamw_schedulefree computes its averaged weights from the states between steps; use "
            "adamw_8bit or adamw_bf16",
        )


def check_sizes_and_captions(data: DataOptions) -> Iterator[ConstraintFinding]:
    """Check the data section, or a dataset whose own fields replaced some of its values."""
    kind = data.resolution_type
    maximum, target = data.maximum_image_size, data.target_downsample_size
    means = f'{data.resolution:g} means {{}} with resolution_type "{kind}"; for {{}} write "{{}}"'
    if kind == "area" and data.resolution > 64:
        yield "resolution", means.format("megapixels", "the edge in pixels", "pixel_area")
    if kind != "area" and data.resolution < 64:
        yield "resolution", means.format("pixels", "megapixels", "area")
    if data.minimum_aspect_ratio > data.maximum_aspect_ratio:
        yield "minimum_aspect_ratio", f"is above maximum_aspect_ratio {data.maximum_aspect_ratio:g}"
    if maximum is None or target is None:
        if maximum is not None:
            yield "maximum_image_size", "needs target_downsample_size as well"
        elif target is not None:
            yield "target_downsample_size", "needs maximum_image_size as well"
    elif not data.resolution <= target <= maximum:
        limits = f"resolution ({data.resolution:g}) and maximum_image_size ({maximum:g})"
        yield "target_downsample_size", f"{target:g} must be between {limits}"
    if data.prepend_instance_prompt and data.only_instance_prompt:
        yield "only_instance_prompt", "prepend_instance_prompt is given too; use one of them"


def _check_logging(run: RunConfig) -> Iterator[ConstraintFinding]:
    names = [name.strip() for name in run.logging.report_to.split(",")]
    for name in names:
        if name not in TRACKER_NAMES and names != ["none"]:
            yield (
                "report_to",
                f"{name!r} is not supported; allowed: none, or a list of "
                f"{', '.join(TRACKER_NAMES)}",
            )
    if isinstance(run.logging.webhook_config, str) and "://" in run.logging.webhook_config:
        yield (
            "webhook_config",
            'an address is not enough; write an object such as {"webhook_type": "discord", '
            '"webhook_url": "https://..."}',
        )


def find_warnings(run: RunConfig, given: GivenOrigins) -> Iterator[str]:
    """Yield warnings about a configuration without errors.

    They name probable mistakes and options without effect.
    """
    model, flow, optimizer, training = run.model, run.flow, run.optimizer, run.training
    if model.mixed_precision == "fp16":
        yield "mixed_precision fp16 overflows easily in Chroma and can give black images; use bf16"
    if model.vae_dtype == "fp16":
        yield "vae_dtype fp16 overflows easily in this VAE; use bf16"
    if "fp8" in (model.base_model_precision, model.text_encoder_1_precision):
        yield "the rounding error of fp8 is three times that of int8, which needs as much memory"
    yield from flow_constraints.find_warnings(flow)
    if optimizer.optimizer == "prodigy" and optimizer.learning_rate < 0.1:
        yield (
            f"prodigy multiplies its estimate by learning_rate {optimizer.learning_rate:g}; 1.0 "
            "is usual"
        )
    if training.max_train_steps and optimizer.lr_warmup_steps >= training.max_train_steps:
        yield (
            f"lr_warmup_steps ({optimizer.lr_warmup_steps}) >= max_train_steps "
            f"({training.max_train_steps}): the learning rate never reaches its target"
        )
    yield from _warn_about_rounding(run)
    yield from find_deepspeed_notices(run)
    yield from _warn_about_lycoris_preset(run, given)
    yield from _warn_about_ineffective(run, given)


def _warn_about_rounding(run: RunConfig) -> Iterator[str]:
    """Warn of full-rank training whose updates are smaller than the spacing of bf16 numbers.

    On chroma-nano it learnt a quarter of what float32 weights learnt (docs/methods.md). DeepSpeed
    trains float32 copies of the weights.
    """
    optimizer = run.optimizer.optimizer
    if not run.model.trains_bf16_weights or run.distributed.deepspeed_config:
        return
    if optimizer not in STOCHASTIC_OPTIMIZERS:
        yield (
            f"{optimizer} rounds bf16 weights to the nearest number, which loses small updates; "
            "adamw_bf16 rounds stochastically and learns as with fp32"
        )


def _warn_about_lycoris_preset(run: RunConfig, given: GivenOrigins) -> Iterator[str]:
    if run.adapter.lora_type != "lycoris" or run.adapter.lycoris_config is None:
        return
    parsed = lycoris_config.require_lycoris_config(run.adapter)
    _, unknown = lycoris_config.find_class_problems(parsed, run.model.model_family)
    if unknown:
        names = ", ".join(unknown)
        yield f"lycoris_config: {run.model.model_family} has no module of class {names}"
    if parsed.preset is not None and "flux_lora_target" in given:
        yield "flux_lora_target has no effect: apply_preset in lycoris_config chooses the modules"


def _warn_about_ineffective(run: RunConfig, given: GivenOrigins) -> Iterator[str]:
    """Yield one sentence for each condition that options were given without.

    What DataOptions need is checked for each dataset instead (data/dataset_file.py), because a
    dataset may have values of its own.
    """
    names_by_group: dict[NeedGroup, list[str]] = defaultdict(list)
    for option, group in _find_ineffective(run):
        if option.name in given and option.section != "data":
            names_by_group[group].append(option.name)
    read = value_reader(run)
    for group, names in names_by_group.items():
        yield format_no_effect(names, group, read)


def format_no_effect(names: list[str], group: NeedGroup, read: ValueReader) -> str:
    """Return "huber_c has no effect with loss_type l2: it needs loss_type huber or smooth_l1"."""
    is_single = len(names) == 1
    current = join_words(
        [f"{need.option} {format_value(read(need.option))}" for need in group], "and"
    )
    return (
        f"{', '.join(names)} {'has' if is_single else 'have'} no effect with {current}: "
        f"{'it needs' if is_single else 'they need'} {describe_needs(group)}"
    )


def _find_ineffective(run: RunConfig) -> Iterator[tuple[Option, NeedGroup]]:
    """Yield each option that is not at its default although something that it needs is not met."""
    read = value_reader(run)
    for option in all_options().values():
        group = find_unmet_need(option.needs, read)
        if group is not None and read(option.name) != option.idle_value:
            yield option, group


def unmet_error(option: Option, group: NeedGroup) -> str | None:
    """Return why the option is refused when this group of its needs is unmet.

    None if it is only ignored.
    """
    return next(
        (option.unmet_errors[need.option] for need in group if need.option in option.unmet_errors),
        None,
    )


def value_reader(run: RunConfig) -> ValueReader:
    """Return a function from the name of an option to its value in this configuration."""
    values: dict[str, Any] = {}
    for section in RunConfig.model_fields:
        values |= dict(getattr(run, section))
    return values.__getitem__
