"""The section about keeping what the base model knows: its own predictions as targets."""

from __future__ import annotations

from typing import ClassVar

from simpletuner.config.option import Effect, OptionSection, option

# Read this file as a table: name, type and default; one sentence of help; level, bounds, and the
# relations to other options.

NO_BASE_REASON = (
    "needs model_type lora: full-rank training changes the base's own weights, so there is no "
    "adapter to switch off and no base prediction to compare with"
)
ADAPTER = {"model_type": "lora"}
NO_BASE = {"model_type": NO_BASE_REASON}


class PreservationOptions(OptionSection):
    """Keeping what the base knows."""

    shared_affects: ClassVar[frozenset[Effect]] = frozenset()

    prior_loss_weight: float = option(
        1.0,
        "Weight in the loss of the images of regularisation datasets (is_regularisation_data).",
        level="common",
        gt=0,
        le=1000,
    )
    masked_prior_preservation_weight: float = option(
        0.0,
        "Weight of the loss outside of masks, where the target is the base's own prediction; with "
        "0 nothing is trained there.",
        level="common",
        needs=ADAPTER,
        unmet_errors=NO_BASE,
        affects={"step", "plan"},
        ge=0,
        le=1000,
    )
    diff_output_preservation: bool = option(
        False,
        "Differential output preservation (DOP): train every image also with a class caption, "
        "towards the base's own prediction; costs another training pass and a forward pass.",
        level="common",
        needs=ADAPTER,
        unmet_errors=NO_BASE,
        affects={"step", "plan"},
    )
    diff_output_preservation_class: str | None = option(
        None,
        "Class of what is trained, such as dog: it replaces the trigger word (modelspec_trigger, "
        "else instance_prompt) in a caption, and is the whole caption where that does not occur.",
        level="common",
        needs={"diff_output_preservation": True},
    )
    diff_output_preservation_multiplier: float = option(
        1.0,
        "Weight of the class captions in the loss.",
        needs={"diff_output_preservation": True},
        gt=0,
        le=1000,
    )
    blank_prompt_preservation: bool = option(
        False,
        "The same with the empty caption instead of a class caption.",
        level="common",
        needs=ADAPTER,
        unmet_errors=NO_BASE,
        affects={"step", "plan"},
    )
    blank_prompt_preservation_multiplier: float = option(
        1.0,
        "Weight of the empty captions in the loss.",
        needs={"blank_prompt_preservation": True},
        gt=0,
        le=1000,
    )
    delta_weight_penalty: float = option(
        0.0,
        "Adds this factor times the sum of ||(alpha / rank) B A||^2 over all adapted modules to "
        "the loss; 0 is off.",
        level="common",
        needs=ADAPTER,
        unmet_errors=NO_BASE,
        affects={"step", "plan"},
        ge=0,
        le=1000,
    )
