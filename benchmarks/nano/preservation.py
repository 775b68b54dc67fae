"""Rows of the table `preservation`: what each way to keep the base's knowledge learns, keeps, costs.

Every row trains the example's sixteen zorbos for the same steps and nothing else, unless it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.nano.verdicts import RULE_IN_WORDS

CLASS_CAPTION = (
    "star"  # the base knows no word for all shapes; a star is the one nearest to a zorbo
)
PENALTIES = (1e-4, 1e-3)
# What a step costs against a plain one, roughly: a forward pass is a third of forward and backward.
WITH_BASE, WITH_COPIES = 4 / 3, 8 / 3


@dataclass(frozen=True)
class PreservationRow:
    """label: in the table. data: see preservation_datasets. cost: of a step against a plain one."""

    label: str
    variant: str
    data: str = "zorbo"
    options: Mapping[str, object] = field(default_factory=dict)
    cost: float = 1.0


ROWS = (
    PreservationRow("zorbos only", "preserve-plain"),
    PreservationRow("with other shapes, as images", "preserve-images", "zorbo-images"),
    PreservationRow("with other shapes, base's prediction", "preserve-base", "zorbo-base", cost=WITH_BASE),
    PreservationRow(f"class caption ({CLASS_CAPTION})", "preserve-class", options={
        "diff_output_preservation": True, "diff_output_preservation_class": CLASS_CAPTION,
        "modelspec_trigger": "zorbo"}, cost=WITH_COPIES),
    PreservationRow("empty caption", "preserve-blank", options={"blank_prompt_preservation": True},
                    cost=WITH_COPIES),
    *(PreservationRow(f"penalty {weight:g}", f"preserve-penalty-{weight:g}",
                      options={"delta_weight_penalty": weight}) for weight in PENALTIES),
    PreservationRow("masked", "preserve-masked", "zorbo-masked"),
    PreservationRow("masked, outside as the base", "preserve-masked-base", "zorbo-masked",
                    {"masked_prior_preservation_weight": 1.0}, WITH_BASE),
)  # fmt: skip
TITLE = "keeping what the base knows, against training the concept alone"
NOTE = (
    "Zorbo: learnt; lost: forgotten, points of the untouched base's score of shapes. Regularisation "
    "shapes take every second batch, so those rows see half as many zorbos. The weights of the methods "
    "were not tuned. Seconds a step are medians of single-threaded runs, two side by side: compare them "
    "within the table only. " + RULE_IN_WORDS
)


def preservation_datasets(
    concept: Mapping[str, object], others: Mapping[str, object], masked_dir: str
) -> dict[str, list[dict[str, object]]]:
    """Return the dataset files of the rows. masked_dir: the zorbos again, with a mask of each."""
    regularisation = {**others, "is_regularisation_data": True}
    return {
        "zorbo": [dict(concept)],
        "zorbo-images": [dict(concept), {**regularisation, "regularisation_target": "images"}],
        "zorbo-base": [dict(concept), regularisation],
        "zorbo-masked": [{**concept, "instance_data_dir": masked_dir}],
    }


def step_cost(variant: str) -> float:
    """Return what a step of a variant costs against a plain one; 1 for those of other tables."""
    return next((row.cost for row in ROWS if row.variant == variant), 1.0)
