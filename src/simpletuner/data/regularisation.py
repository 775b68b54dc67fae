"""Rules between the datasets of a run and its options: what regularisation datasets need."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.config.sections_preservation import NO_BASE_REASON
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.errors import Problem


def regularisation_problems(model_type: str, datasets: Sequence[DatasetConfig]) -> list[Problem]:
    """Return why the regularisation datasets cannot be used. datasets: all that are trained on."""
    problems = [
        Problem(
            f"{dataset.id}.is_regularisation_data",
            f"{NO_BASE_REASON}. The images themselves can be the target: "
            '"regularisation_target": "images"',
        )
        for dataset in datasets
        if dataset.regularisation_target == "base" and model_type != "lora"
    ]
    if datasets and all(dataset.regularisation_target for dataset in datasets):
        problems.append(
            Problem(
                "is_regularisation_data",
                "every dataset has it, so nothing is taught; leave it out of the datasets to learn",
            )
        )
    return problems
