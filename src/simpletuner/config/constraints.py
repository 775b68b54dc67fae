"""What must hold between options, and what is worth a word though it may be meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from simpletuner.config import lycoris_config
from simpletuner.config.image_metrics import IMAGE_METRICS
from simpletuner.config.optimizer_arguments import parse_optimizer_arguments
from simpletuner.config.schema import DataOptions, FlowOptions, RunConfig
from simpletuner.errors import ConfigError
from simpletuner.events.trackers import TRACKER_NAMES

GivenOrigins = Mapping[str, str]  # option -> where it was given; defaults are absent
ConstraintFinding = tuple[str, str]  # option it is reported at, what is wrong
RESOLUTION_PATTERN = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")
BASE_DERIVED_INITS = (
    "olora",
    "pissa",
)  # take the base's principal part into A and B, instead of a delta of zero
LORA_ONLY_OPTIONS = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "flux_lora_target",
    "lora_target_modules",
    "use_dora",
    "use_rslora",
    "lora_init_type",
    "lora_format",
    "lora_type",
    "lycoris_config",
)
# What lycoris_config says by its own names, or LyCORIS' kinds cannot be.
STANDARD_LORA_OPTIONS = {
    "lora_rank": "use lycoris_config's linear_dim",
    "lora_alpha": "use lycoris_config's linear_alpha",
    "use_dora": "is of a LoRA",
    "use_rslora": "is of a LoRA",
    "lora_init_type": "is of a LoRA",
    "lora_format": "no other layout holds a LoHa or LoKr; simpletuner export --rank N writes a LoRA near it",
}
SCORING_OPTIONS = ("evaluation_prompts", "evaluation_step_interval")
BETA_DENSITY_OPTIONS = ("flow_beta_schedule_alpha", "flow_beta_schedule_beta")
# A gradient of the velocity error is about 1e-6 per element; below 6e-5 fp16 loses its digits.
FP16_REFUSAL = (
    'mixed_precision = "fp16": training takes bf16 or no; fp16 rounds small gradients to zero and overflows '
    "in Chroma's activations. Cards without bf16 units compute it too, more slowly"
)


def find_errors(run: RunConfig, given: GivenOrigins) -> Iterator[ConstraintFinding]:
    """Every reason why these options cannot hold together."""
    model, optimizer, training = run.model, run.optimizer, run.training
    if training.max_train_steps and training.num_train_epochs:
        yield "max_train_steps", "num_train_epochs is given too; the length of a run is one of them"
    if model.base_model_default_dtype == "bf16" and model.mixed_precision != "bf16":
        yield (
            "base_model_default_dtype",
            f"bf16 weights do not fit mixed_precision {model.mixed_precision}",
        )
    if model.model_type == "full" and model.base_model_precision != "no_change":
        what = 'cannot be trained themselves, as model_type "full" does; use "no_change" or model_type "lora"'
        yield "base_model_precision", f"{model.base_model_precision} weights {what}"
    yield from _check_block_memory(run)
    if "sdxl" in (model.pretrained_vae_model_name_or_path or "").lower():
        yield (
            "pretrained_vae_model_name_or_path",
            "is another model's VAE; leave it out for Chroma's own",
        )
    if model.model_type == "full" and run.adapter.init_lora:
        yield "init_lora", 'a LoRA to start from needs model_type "lora"'
    yield from _check_lycoris(run, given)
    if run.adapter.use_dora and run.adapter.lora_format != "diffusers":
        what = "cannot hold a DoRA: ComfyUI, Forge and kohya's tools scale magnitudes by rules of their own"
        yield (
            "lora_format",
            f'{run.adapter.lora_format} {what}; use "diffusers", or leave use_dora off',
        )
    if run.adapter.lora_init_type in BASE_DERIVED_INITS and run.adapter.use_dora:
        what = "cannot go with use_dora: no file can express the result on the untouched base"
        yield "lora_init_type", f'{run.adapter.lora_init_type} {what}; use "default"'
    if run.adapter.lora_init_type in BASE_DERIVED_INITS and run.adapter.init_lora is not None:
        yield "init_lora", "and lora_init_type both say how A and B start; remove one of them"
    if isinstance(run.adapter.lora_target_modules, str):
        try:
            re.compile(run.adapter.lora_target_modules)
        except (re.error, OverflowError, RecursionError) as error:
            yield "lora_target_modules", f"is not a regular expression: {error}"
    if optimizer.lr_scale and optimizer.lr_scale_sqrt:
        yield "lr_scale_sqrt", "lr_scale is given too; scale by one of them"
    if optimizer.lr_end > optimizer.learning_rate and optimizer.lr_scheduler != "constant":
        yield "lr_end", f"{optimizer.lr_end:g} is above learning_rate {optimizer.learning_rate:g}"
    if optimizer.optimizer == "adamw_schedulefree" and optimizer.lr_scheduler != "constant":
        yield "lr_scheduler", 'the schedule-free optimizer makes its own course; use "constant"'
    yield from _check_optimizer_memory(run)
    try:
        parse_optimizer_arguments(optimizer)
    except ConfigError as error:
        yield "optimizer_config", str(error)
    yield from check_sizes_and_captions(run.data)
    yield from _check_flow(run.flow, given)
    yield from _check_validation_and_logging(run)


def _check_lycoris(run: RunConfig, given: GivenOrigins) -> Iterator[ConstraintFinding]:
    if run.adapter.lora_type == "standard":
        if run.adapter.lycoris_config is not None:
            yield "lycoris_config", 'is read with lora_type "lycoris" alone'
        return
    try:
        lycoris_config.require_lycoris_config(run.adapter)
    except ConfigError as error:
        yield "lycoris_config", str(error)
    defaults = type(run.adapter)()
    for name, what in STANDARD_LORA_OPTIONS.items():
        if run.adapter.model_dump()[name] != defaults.model_dump()[name]:
            yield name, f'with lora_type "lycoris": {what}'


def _check_block_memory(run: RunConfig) -> Iterator[ConstraintFinding]:
    """What waits in host memory must be frozen, recomputed, and not be in host memory anyway."""
    model = run.model
    swapped, recomputed = model.musubi_blocks_to_swap, model.gradient_checkpointing
    if swapped > 1 and swapped != int(swapped):
        yield (
            "musubi_blocks_to_swap",
            f"{swapped:g} is neither a number of blocks nor a fraction below 1",
        )
    if swapped and model.model_type == "full":
        yield "musubi_blocks_to_swap", 'needs a frozen base; model_type "full" trains it. Use 0'
    if swapped and recomputed is False:
        what = "keeps fetched weights for the backward pass; use gradient_checkpointing true"
        yield "musubi_blocks_to_swap", f"without recomputing, autograd {what}"
    if not isinstance(recomputed, (bool, str)) and swapped > recomputed:
        what = f"only {recomputed} are recomputed, and swapped blocks must be"
        yield "musubi_blocks_to_swap", f"{swapped:g} blocks: {what}; raise gradient_checkpointing"
    waiting = {
        "musubi_blocks_to_swap": swapped > 0,
        "gradient_checkpointing_backend": model.gradient_checkpointing_backend == "offload",
    }
    for name in (
        name for name, wanted in waiting.items() if wanted and model.device in ("cpu", "mps")
    ):
        yield (
            name,
            f'has no use on device "{model.device}", whose memory is the host\'s; leave it out',
        )


def _check_optimizer_memory(run: RunConfig) -> Iterator[ConstraintFinding]:
    """What cannot be where weights are stepped singly, or where states are away between steps."""
    optimizer, accumulation = run.optimizer, run.training.gradient_accumulation_steps
    released = optimizer.optimizer_release_gradients
    hosted = optimizer.optimizer_cpu_offload_method != "none"
    alone = {"optimizer_release_gradients": released, "optimizer_cpu_offload_method": hosted}
    if released and accumulation > 1:
        what = f"a gradient is used at once, gradient_accumulation_steps {accumulation} would add them up"
        yield (
            "optimizer_release_gradients",
            f"{what}; use 1, and a larger train_batch_size if it fits",
        )
    if released and optimizer.max_grad_norm > 0 and optimizer.grad_clip_method == "norm":
        what = (
            f"max_grad_norm {optimizer.max_grad_norm:g} limits a norm that is known only at the end"
        )
        yield "optimizer_release_gradients", f'{what}; use 0, or grad_clip_method "value"'
    for name in (
        name for name, wanted in alone.items() if wanted and optimizer.optimizer == "prodigy"
    ):
        yield name, "prodigy finds its rate from all weights together; use another optimizer"
    if hosted and optimizer.optimizer == "adamw_schedulefree":
        what = "adamw_schedulefree shows its average between steps, from its state"
        yield "optimizer_cpu_offload_method", f"{what}; use adamw_8bit or adamw_bf16"


def check_sizes_and_captions(data: DataOptions) -> Iterator[ConstraintFinding]:
    """Of the section, or of a dataset with its own fields laid over it."""
    kind, maximum, target = (
        data.resolution_type,
        data.maximum_image_size,
        data.target_downsample_size,
    )
    means = f'{data.resolution:g} means {{}} with resolution_type "{kind}"; for {{}} write "{{}}"'
    if kind == "area" and data.resolution > 64:
        yield "resolution", means.format("megapixels", "the edge in pixels", "pixel_area")
    if kind != "area" and data.resolution < 64:
        yield "resolution", means.format("pixels", "megapixels", "area")
    if data.minimum_aspect_ratio > data.maximum_aspect_ratio:
        yield "minimum_aspect_ratio", f"is above maximum_aspect_ratio {data.maximum_aspect_ratio:g}"
    if maximum is None or target is None:
        if maximum != target:
            given, other = ("maximum_image_size", "target_downsample_size")[:: 1 if maximum else -1]
            yield given, f"needs {other} as well"
    elif not data.resolution <= target <= maximum:
        limits = f"resolution ({data.resolution:g}) and maximum_image_size ({maximum:g})"
        yield "target_downsample_size", f"{target:g} should lie between {limits}"
    if data.prepend_instance_prompt and data.only_instance_prompt:
        yield "only_instance_prompt", "prepend_instance_prompt is given too; use one of them"


def _check_flow(flow: FlowOptions, given: GivenOrigins) -> Iterator[ConstraintFinding]:
    choices = {
        "flow_custom_timesteps": flow.flow_custom_timesteps is not None,
        "flow_use_uniform_schedule": flow.flow_use_uniform_schedule,
        "flow_use_beta_schedule": flow.flow_use_beta_schedule,
        "flux_fast_schedule": flow.flux_fast_schedule,
        "chroma_sigma_density": "chroma_sigma_density" in given,
    }
    chosen = [name for name, on in choices.items() if on]
    same = {"uniform": "flow_use_uniform_schedule", "beta": "flow_use_beta_schedule"}
    agree = same.get(flow.chroma_sigma_density) == chosen[0] if len(chosen) == 2 else False
    if len(chosen) > 1 and not agree:
        yield (
            chosen[0],
            f"{' and '.join(chosen[1:])} is given too; the noise levels follow one of them",
        )
    if flow.flow_schedule_shift is not None and flow.flow_schedule_auto_shift:
        yield "flow_schedule_auto_shift", "flow_schedule_shift is given too; use one of them"
    if flow.flow_custom_timesteps is not None:
        try:
            levels = [float(text) for text in flow.flow_custom_timesteps.split(",")]
        except ValueError:
            levels = [-1.0]
        if not all(0 <= level <= 1000 for level in levels):
            yield (
                "flow_custom_timesteps",
                "must be a comma list of sigmas (0 to 1) or timesteps (0 to 1000)",
            )


def _check_validation_and_logging(run: RunConfig) -> Iterator[ConstraintFinding]:
    for size in (run.validation.validation_resolution or "").replace(" ", "").split(","):
        match = RESOLUTION_PATTERN.fullmatch(size)
        if size and (match is None or any(int(side) < 64 for side in match.groups() if side)):
            yield (
                "validation_resolution",
                f'{size!r} is not "512" or "512x768" (pixels, at least 64)',
            )
    yield from _check_scoring(run)
    names = [name.strip() for name in run.logging.report_to.split(",")]
    for name in names:
        if name not in TRACKER_NAMES and names != ["none"]:
            yield (
                "report_to",
                f"{name!r} is not offered; allowed: none, or some of {', '.join(TRACKER_NAMES)}",
            )
    if isinstance(run.logging.webhook_config, str) and "://" in run.logging.webhook_config:
        yield "webhook_config", 'an address alone is not enough; write {"webhook_type": ..., ...}'
    publishing, full = run.publishing, run.model.model_type == "full"
    if publishing.push_checkpoints_to_hub and not publishing.push_to_hub:
        yield "push_checkpoints_to_hub", "needs push_to_hub as well"
    if publishing.push_checkpoints_to_hub and full:
        what = "holds its state alone, for going on; the weights are uploaded at the end"
        yield "push_checkpoints_to_hub", f"a checkpoint at full rank {what}: use push_to_hub alone"


def _check_scoring(run: RunConfig) -> Iterator[ConstraintFinding]:
    """What can be scored, and of which base: of one that knows the words and draws at 128 px."""
    names = [name.strip() for name in run.validation.evaluation_type.split(",")]
    for name in names:
        if name == "clip":
            yield (
                "evaluation_type",
                "clip needs a second model; held-out loss (an eval dataset) does not",
            )
        elif name not in IMAGE_METRICS and names != ["none"]:
            yield (
                "evaluation_type",
                f"{name!r} is not offered; allowed: none, or some of {', '.join(IMAGE_METRICS)}",
            )
    base = run.model.pretrained_model_name_or_path
    own = run.model.model_flavour == "nano" or (base is not None and Path(base).is_dir())
    nano_only = any(name in names for name, spec in IMAGE_METRICS.items() if spec.nano_only)
    if not own and nano_only:
        what = "is about chroma-nano's pictures; use model_flavour nano, or a folder with a base of its kind"
        yield "evaluation_type", f"{run.validation.evaluation_type} {what}"


def find_warnings(run: RunConfig, given: GivenOrigins) -> Iterator[str]:
    """What the person should know about a configuration that holds."""
    model, flow, optimizer, training = run.model, run.flow, run.optimizer, run.training
    if model.mixed_precision == "fp16":
        yield "mixed_precision fp16 overflows easily in Chroma and may draw black pictures; bf16 does not"
    if model.vae_dtype == "fp16":
        yield "vae_dtype fp16 overflows easily in this VAE; bf16 does not"
    if "fp8" in (model.base_model_precision, model.text_encoder_1_precision):
        yield "fp8 weights err three times as much as int8 ones, which take the same room"
    if flow.flux_fast_schedule:
        yield "flux_fast_schedule trains sigma 1.0 seven times in ten and skips the remap; leave it off"
    if flow.chroma_sigma_density == "quadratic-literal":
        yield "chroma_sigma_density quadratic-literal never trains sigma in [0.25, 0.75); quadratic does"
    if flow.flow_schedule_shift is not None or flow.flow_schedule_auto_shift:
        yield "a schedule shift is on; Chroma needs none"
    if optimizer.optimizer == "prodigy" and optimizer.learning_rate < 0.1:
        yield f"prodigy multiplies its estimate by learning_rate {optimizer.learning_rate:g}; 1.0 is usual"
    if training.max_train_steps and optimizer.lr_warmup_steps >= training.max_train_steps:
        yield "lr_warmup_steps is not below max_train_steps: the learning rate never arrives"
    yield from _options_without_effect(run, given)


def _options_without_effect(run: RunConfig, given: GivenOrigins) -> Iterator[str]:
    densities = ("quadratic", "quadratic-literal", "logit-normal")
    idle = {
        "with model_type full": (
            run.model.model_type == "full",
            (*LORA_ONLY_OPTIONS, "validation_strengths"),
        ),
        "with model_type lora": (run.model.model_type == "lora", ("save_native_file",)),
        "without evaluation_type": (run.validation.evaluation_type == "none", SCORING_OPTIONS),
        "beside lora_target_modules": (
            run.adapter.lora_target_modules is not None,
            ("flux_lora_target",),
        ),
        "without a beta density": (
            not run.flow.flow_use_beta_schedule and run.flow.chroma_sigma_density != "beta",
            BETA_DENSITY_OPTIONS,
        ),
        "with this density": (
            run.flow.chroma_sigma_density not in densities,
            ("flow_sigmoid_scale",),
        ),
        "without a quantised model": (
            {run.model.base_model_precision, run.model.text_encoder_1_precision} == {"no_change"},
            ("quantize_via", "quantized_cache_dir"),
        ),
        "with loss_type l2": (run.flow.loss_type == "l2", ("huber_schedule", "huber_c")),
        "with lr_scheduler constant": (
            run.optimizer.lr_scheduler == "constant",
            ("lr_end", "lr_power"),
        ),
        "without gradient_checkpointing": (
            not run.model.gradient_checkpointing,
            ("gradient_checkpointing_interval", "gradient_checkpointing_backend"),
        ),
        "without dynamo_backend inductor": (
            run.model.dynamo_backend != "inductor",
            ("dynamo_mode",),
        ),
    }
    for reason, (holds, names) in idle.items():
        silent = [name for name in names if holds and name in given]
        if silent:
            yield f"{', '.join(silent)} {'has' if len(silent) == 1 else 'have'} no effect {reason}"
