"""The section about noise levels, the network's input in training, and the loss."""

from __future__ import annotations

from typing import ClassVar, Literal

from simpletuner.config.option import Effect, Not, OptionSection, option

# Read this file as a table: name, type and default; one sentence of help; level, bounds, other
# names, and the relations to other options.

CONTINUOUS_DENSITY = {"flow_custom_timesteps": None, "flux_fast_schedule": False}
BETA_DENSITY = {"chroma_sigma_density": "beta", "flow_use_beta_schedule": True}
HUBER_LOSS = {"loss_type": ("huber", "smooth_l1")}
ROLLOUT = {"scheduled_sampling_probability": Not(0.0)}
RAMP = {**ROLLOUT, "scheduled_sampling_ramp_steps": Not(0)}


class FlowOptions(OptionSection):
    """Noise levels and loss."""

    shared_affects: ClassVar[frozenset[Effect]] = frozenset()

    chroma_sigma_density: Literal[
        "quadratic", "parabola", "quadratic-literal", "uniform", "logit-normal", "beta"
    ] = option(
        "quadratic",
        "Density of the trained noise levels: quadratic visits both tails more often, parabola "
        "is the one that Chroma's author used, quadratic-literal never trains sigma 0.25 to 0.75.",
        level="common",
    )
    flow_schedule_shift: float | None = option(
        None,
        "Shift to higher noise levels, s x / (1 + (s - 1) x); null is off, which is right for "
        "Chroma.",
        zero_is_null=True,
        needs=CONTINUOUS_DENSITY,
        gt=0,
        le=100,
    )
    flow_schedule_auto_shift: bool = option(
        False, "Shift by the number of image tokens instead.", needs=CONTINUOUS_DENSITY
    )
    flow_sigmoid_scale: float = option(
        1.0,
        "Standard deviation of the normal variable before the sigmoid.",
        needs={
            "chroma_sigma_density": ("quadratic", "quadratic-literal", "logit-normal"),
            "flow_use_uniform_schedule": False,
            "flow_use_beta_schedule": False,
            **CONTINUOUS_DENSITY,
        },
        gt=0,
        le=100,
    )
    flow_use_uniform_schedule: bool = option(False, "Alias for chroma_sigma_density=uniform.")
    flow_use_beta_schedule: bool = option(False, "Alias for chroma_sigma_density=beta.")
    flow_beta_schedule_alpha: float = option(
        2.0, "First parameter of the beta density.", needs_any=BETA_DENSITY, gt=0, le=100
    )
    flow_beta_schedule_beta: float = option(
        2.0, "Second parameter of the beta density.", needs_any=BETA_DENSITY, gt=0, le=100
    )
    flow_custom_timesteps: str | None = option(
        None,
        "Train these noise levels only: a comma-separated list of sigmas up to 1, or of "
        "timesteps up to 1000.",
    )
    flow_timesteps_mode: Literal["fixed-list", "round-robin"] = option(
        "fixed-list",
        "Choose from flow_custom_timesteps at random (fixed-list), or in turn (round-robin).",
        needs={"flow_custom_timesteps": Not(None)},
    )
    flux_fast_schedule: bool = option(
        False,
        "Noise levels of a few-step model (seven of ten at 1.0); leave it off for Chroma.",
        level="common",
    )
    flux_guidance_mode: Literal["constant"] = option(
        "constant",
        "Chroma's guidance input is constant; there is no other choice.",
        refused_values={
            "random-range": "Chroma has no guidance range",
            "mobius": "Chroma has no guidance range",
        },
    )
    stratified_sigmas: bool = option(
        True,
        "Spread the noise levels of one optimizer step evenly, or with one sample a step those of "
        "16 steps: same density, less variance.",
        needs_any={"flow_timesteps_mode": "fixed-list", "flow_custom_timesteps": None},
    )
    loss_type: Literal["l2", "huber", "smooth_l1"] = option(
        "l2", "Loss on the velocity.", level="common", affects={"step", "plan"}
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr",
        "How huber_c depends on the noise level.",
        needs=HUBER_LOSS,
        affects={"step", "plan"},
    )
    huber_c: float = option(
        0.1,
        "Transition point between quadratic and linear loss, for huber and smooth_l1.",
        needs=HUBER_LOSS,
        gt=0,
        le=100,
    )
    loss_weight_by_sigma: str | None = option(
        None,
        "Weight of the loss by noise level: cosmap, min_snr (limit 5), or points sigma:weight such "
        'as "0:0.5, 0.5:1, 1:2", linear between them; null weighs all equally. The held-out loss '
        "is never weighted.",
    )
    input_perturbation: float = option(
        0.0,
        "Extra noise in the network's input, but not in its target.",
        affects={"step", "plan"},
        ge=0,
        le=1,
    )
    scheduled_sampling_probability: float = option(
        0.0,
        "Rollout (scheduled sampling): probability that a sample's noisy input is the network's "
        "own prediction, one sampling step from a higher noise level; 0 is off.",
        level="common",
        affects={"step", "plan"},
        ge=0,
        le=1,
    )
    scheduled_sampling_max_step_offset: int = option(
        50,
        "Longest step of a rollout in timesteps of 1/1000: the length is uniform up to it; 36 is a "
        "step of a 28-step sampler, 50 one of 20 steps.",
        unit="timesteps",
        needs=ROLLOUT,
        idle_value=0,
        ge=0,
        le=250,
    )
    scheduled_sampling_strategy: Literal["uniform", "biased_early", "biased_late"] = option(
        "uniform",
        "Lengths of the steps of rollouts: uniform, more short ones (biased_early), or more long "
        "ones (biased_late).",
        needs=ROLLOUT,
    )
    scheduled_sampling_ramp_steps: int = option(
        0,
        "Steps in which the probability of a rollout rises from its start to its end; 0 turns the "
        "ramp off.",
        unit="steps",
        needs=ROLLOUT,
        affects={"plan"},
        ge=0,
    )
    scheduled_sampling_start_step: int = option(
        0,
        "Step at which rollouts begin, or their ramp.",
        unit="steps",
        needs=ROLLOUT,
        ge=0,
    )
    scheduled_sampling_prob_start: float = option(
        0.0,
        "Probability of a rollout before scheduled_sampling_start_step, where the ramp begins.",
        needs=RAMP,
        ge=0,
        le=1,
    )
    scheduled_sampling_prob_end: float | None = option(
        None,
        "Probability of a rollout at the end of the ramp; null is scheduled_sampling_probability.",
        needs=RAMP,
        idle_value=0.5,
        affects={"plan"},
        ge=0,
        le=1,
    )
    scheduled_sampling_ramp_shape: Literal["linear", "cosine"] = option(
        "linear", "Shape of the ramp, which rises.", needs=RAMP
    )
    mixflow_enabled: bool = option(
        False,
        "MixFlow: the network's input has more noise than the level that it is given, as at "
        "sampling; the target does not change.",
    )
    mixflow_gamma: float = option(
        0.8,
        "Largest part of the remaining noise that MixFlow adds: the input is at "
        "sigma + u gamma (1 - sigma), u uniform in [0, 1).",
        needs={"mixflow_enabled": True},
        gt=0,
        le=1,
    )
