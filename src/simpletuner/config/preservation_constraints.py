"""Rules between the options that keep what the base knows, and between them and the others."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config import deepspeed_config, lycoris_config
from simpletuner.config.schema import RunConfig
from simpletuner.errors import ConfigError

WEIGHTS_STAGE = 3  # of DeepSpeed: every process holds a part of each weight


def uses_base_prediction(run: RunConfig) -> bool:
    """Return whether options ask for the base's prediction; datasets may do so too."""
    options = run.preservation
    return (
        options.diff_output_preservation
        or options.blank_prompt_preservation
        or options.masked_prior_preservation_weight > 0
    )


def find_errors(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield each option that cannot be used as given, and why."""
    options = run.preservation
    if options.diff_output_preservation and options.blank_prompt_preservation:
        yield (
            "blank_prompt_preservation",
            "diff_output_preservation is given too; each adds a training pass, so use one of them",
        )
    if (
        options.diff_output_preservation
        and not (options.diff_output_preservation_class or "").strip()
    ):
        yield (
            "diff_output_preservation_class",
            "is missing: diff_output_preservation trains a class caption, for example dog",
        )
    if options.delta_weight_penalty and run.model.model_type == "lora":
        reason = _no_penalty_reason(run)
        if reason:
            yield "delta_weight_penalty", reason


def _no_penalty_reason(run: RunConfig) -> str:
    """Return why the norm of the adapter's delta is not available; "" where it is."""
    adapter = run.adapter
    if adapter.lora_type == "lycoris":
        if "loha" in _lycoris_algorithms(run):
            return (
                "algo loha: the norm of an elementwise product needs the whole matrix of every "
                "module; use algo lokr, or lora_type standard"
            )
    elif adapter.use_dora:
        return (
            "use_dora rescales the whole weight, so its change is not a product of two small "
            "factors; turn use_dora off"
        )
    if deepspeed_config.zero_stage(run) == WEIGHTS_STAGE:
        return (
            "deepspeed_config stage 3 divides the adapter among the processes, and the norm needs "
            "whole factors; use stage 2, or leave deepspeed_config out"
        )
    return ""


def _lycoris_algorithms(run: RunConfig) -> set[str]:
    """Return the algorithms of all modules; empty where lycoris_config cannot be read."""
    try:
        parsed = lycoris_config.require_lycoris_config(run.adapter)
    except ConfigError:
        return set()
    preset = parsed.preset or lycoris_config.LycorisPreset()
    own = [*preset.by_class.values(), *preset.by_name.values()]
    return {parsed.algo, *(settings.algo for settings in own)}
