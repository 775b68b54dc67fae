"""Sentences about the targets of a run, for the log, the report and the model card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from simpletuner.cache.target_rules import TargetRules
from simpletuner.config.schema import RunConfig
from simpletuner.data.sample_types import BucketedSample
from simpletuner.events.formatting import count_of

TARGET_NAMES = {"base": "the base's prediction", "images": "the images themselves"}


def describe_targets(
    run: RunConfig, rules: TargetRules, samples: Sequence[BucketedSample]
) -> list[str]:
    """Return one sentence for each target and weight other than those of plain images."""
    images = [item.sample for item in samples if item.crop_index == 0]
    counts = Counter(sample.dataset for sample in images)
    masked = Counter(sample.dataset for sample in images if sample.mask is not None)
    outside = "nothing is trained outside of them"
    if rules.outside_weight:
        outside = (
            "outside of them towards the base's prediction, "
            f"weight {run.preservation.masked_prior_preservation_weight:g}"
        )
    lines = [
        f"Masks: {count} of {count_of(counts[name], 'image')} of {name}; {outside}"
        for name, count in sorted(masked.items())
    ]
    lines += [
        f"Regularisation: {count_of(counts[name], 'image')} of {name} towards "
        f"{TARGET_NAMES[target]}, weight {rules.prior_weight:g}"
        for name, target in rules.regularisation.items()
    ]
    if rules.preserved is not None:
        text = rules.preserved.class_caption
        kind = f"Class captions ({text})" if text else "The empty caption of every image"
        lines.append(f"{kind} towards the base's prediction, weight {rules.preservation_weight:g}")
    penalty = run.preservation.delta_weight_penalty
    if penalty:
        lines.append(f"Penalty on the squared norm of the change of the weights: {penalty:g}")
    return lines
