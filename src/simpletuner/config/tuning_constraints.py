"""Rules between the options of held-out images, early stopping and the search of a rate."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.schema import RunConfig
from simpletuner.errors import ConfigError

NO_HELD_OUT_IMAGES = (
    "early_stopping needs held-out images: add a dataset with dataset_type eval, or set "
    "validation_split (0.1 holds out one image in ten)"
)


def parse_fold(text: str) -> tuple[int, int]:
    """Return (2, 5) for "2/5". Raises ConfigError where there is no such part."""
    fold, folds = map(int, text.split("/"))
    if not 1 <= fold <= folds or folds < 2:
        raise ConfigError(f"{text} is not one of at least two parts; write for example 1/2")
    return fold, folds


def find_tuning_errors(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield each option that cannot be used as given, and why."""
    tuning = run.tuning
    if tuning.validation_fold is None:
        return
    if tuning.validation_split:
        yield "validation_fold", "validation_split is given too; use one of them"
    try:
        parse_fold(tuning.validation_fold)
    except ConfigError as error:
        yield "validation_fold", str(error)
