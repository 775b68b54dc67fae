"""Rules between the options of noise levels, rollouts and the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from simpletuner.config.loss_weights import WEIGHT_NAMES, parse_weight_points
from simpletuner.config.option import join_words
from simpletuner.config.schema import FlowOptions

# In timesteps of 1/1000. Samplers take 4 to 50 steps, so their steps are 250 to 20 long.
SHORTEST_SAMPLER_STEP = 20


def find_errors(flow: FlowOptions, given: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each option that cannot be used as given, and why. given: option -> where."""
    choices = {
        "flow_custom_timesteps": flow.flow_custom_timesteps is not None,
        "flow_use_uniform_schedule": flow.flow_use_uniform_schedule,
        "flow_use_beta_schedule": flow.flow_use_beta_schedule,
        "flux_fast_schedule": flow.flux_fast_schedule,
        "chroma_sigma_density": "chroma_sigma_density" in given,
    }
    chosen = [name for name, is_given in choices.items() if is_given]
    alias = {"uniform": "flow_use_uniform_schedule", "beta": "flow_use_beta_schedule"}
    agree = len(chosen) == 2 and alias.get(flow.chroma_sigma_density) == chosen[0]
    if len(chosen) > 1 and not agree:
        others = join_words(chosen[1:], "and")
        yield (
            chosen[0],
            f"{others} {'is' if len(chosen) == 2 else 'are'} given too; choose the noise levels "
            "with one of them",
        )
    yield from _check_noise_levels(flow)
    if flow.loss_weight_by_sigma is not None and flow.loss_weight_by_sigma not in WEIGHT_NAMES:
        try:
            parse_weight_points(flow.loss_weight_by_sigma)
        except ValueError as error:
            yield "loss_weight_by_sigma", str(error)
    yield from _check_network_input(flow)


def _check_noise_levels(flow: FlowOptions) -> Iterator[tuple[str, str]]:
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
                "must be a comma-separated list of sigmas (0 to 1) or timesteps (0 to 1000)",
            )


def _check_network_input(flow: FlowOptions) -> Iterator[tuple[str, str]]:
    """Check what changes the network's input in training: rollouts, MixFlow, perturbation."""
    inputs = {
        "scheduled_sampling_probability": flow.scheduled_sampling_probability > 0,
        "mixflow_enabled": flow.mixflow_enabled,
        "input_perturbation": flow.input_perturbation > 0,
    }
    chosen = [name for name, is_on in inputs.items() if is_on]
    if len(chosen) > 1:
        yield (
            chosen[0],
            f"{join_words(chosen[1:], 'and')} {'is' if len(chosen) == 2 else 'are'} given too; "
            "each changes the network's input to reduce exposure bias, so use one of them",
        )
    if not flow.scheduled_sampling_probability:
        return
    if not flow.scheduled_sampling_max_step_offset:
        yield (
            "scheduled_sampling_max_step_offset",
            "0 leaves no step for a rollout; use 36 (a step of a 28-step sampler) to 50 (of 20 "
            "steps), or set scheduled_sampling_probability to 0",
        )
    end = flow.scheduled_sampling_prob_end
    end = flow.scheduled_sampling_probability if end is None else end
    if flow.scheduled_sampling_ramp_steps and flow.scheduled_sampling_prob_start > end:
        yield (
            "scheduled_sampling_prob_start",
            f"{flow.scheduled_sampling_prob_start:g} is above the end of the ramp, {end:g}; a ramp "
            "only rises, because an untrained network's rollouts are far from the path",
        )


def find_warnings(flow: FlowOptions) -> Iterator[str]:
    """Yield warnings about values that are allowed and probably a mistake."""
    if flow.flux_fast_schedule:
        yield (
            "flux_fast_schedule trains sigma 1.0 in seven of ten samples and skips the remap; "
            "leave it off"
        )
    if flow.chroma_sigma_density == "quadratic-literal":
        yield (
            "chroma_sigma_density quadratic-literal never trains sigma in [0.25, 0.75); "
            "quadratic does"
        )
    if flow.flow_schedule_shift is not None or flow.flow_schedule_auto_shift:
        yield "a schedule shift is on; Chroma needs none"
    offset = flow.scheduled_sampling_max_step_offset
    if flow.scheduled_sampling_probability and 0 < offset < SHORTEST_SAMPLER_STEP:
        yield (
            f"scheduled_sampling_max_step_offset {offset} is shorter than a step of any usual "
            f"sampler, so a rollout drifts less than sampling does; use 36 to 50"
        )
