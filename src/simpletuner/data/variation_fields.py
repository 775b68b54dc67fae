"""Fields of a dataset about its captions, crops and batches, and about when it is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from simpletuner.config.option import OptionSection, option
from simpletuner.config.option_catalog import section_options
from simpletuner.config.option_values import (
    InvalidOptionValue,
    did_you_mean,
    parse_value,
    validate_section,
)
from simpletuner.data.caption_filters import read_filters
from simpletuner.data.caption_variants import CaptionVariants
from simpletuner.data.dataset_config import ActivePeriod
from simpletuner.errors import ConfigError

MAX_VARIANTS = 64
TRAINED = {"dataset_type": "image"}
Weight = Annotated[float, Field(gt=0, le=10**6)]

# Read this file as a table: name, type and default; one sentence of help; bounds, other values, and
# the relations to other fields.


class VariationFields(OptionSection):
    """Captions, crops, batches and noise levels of a dataset, and its place in the run."""

    caption_shuffle: dict[str, Any] | None = option(
        None,
        "Variants of each caption with its tags in another order, made once, before training: an "
        "object with enable, count, seed, split_on, position_start, include_original, and with "
        "reorder and tag_dropout.",
        needs=TRAINED,
    )
    caption_filter_list: str | list[str] | None = option(
        None,
        "Texts that are removed from captions of files, names and tables: a list, or a .txt or "
        ".json file. s/pattern/replacement/ replaces; a filter that a caption does not hold "
        "literally is a regular expression.",
    )
    caption_weights: list[Weight] | None = option(
        None,
        "How often each alternative caption is used, relative to the others: the first, the second "
        "and so on; the last number counts for all that follow.",
        needs=TRAINED,
        min_length=1,
    )
    train_batch_size: int | None = option(
        None,
        "Samples of a micro-batch of this dataset; null is train_batch_size of the config.",
        unit="samples",
        needs=TRAINED,
        zero_is_null=True,
        ge=1,
        le=1024,
    )
    timestep_sampling_offset: float = option(
        0.0,
        "Moves the noise levels of this dataset: it is added to logit(sigma), as a flow_schedule_"
        "shift of exp(offset) would, before the shift and the density's own remap; above 0 is "
        "more noise.",
        needs=TRAINED,
        ge=-10,
        le=10,
    )
    start_epoch: int = option(
        1,
        "First epoch in which the dataset is trained on, counted from 1 (0 is the same).",
        unit="epochs",
        needs=TRAINED,
        idle_value=0,
        ge=0,
        le=10**9,
    )
    end_epoch: int | None = option(
        None,
        "Last epoch in which the dataset is trained on; null is the last of the run.",
        unit="epochs",
        needs=TRAINED,
        zero_is_null=True,
        ge=1,
        le=10**9,
    )
    start_step: int = option(
        0,
        "Optimizer steps before the dataset is trained on; it begins an epoch.",
        unit="steps",
        needs=TRAINED,
        ge=0,
        le=10**9,
    )
    end_step: int | None = option(
        None,
        "Last optimizer step in which the dataset is trained on; null is the last of the run.",
        unit="steps",
        needs=TRAINED,
        zero_is_null=True,
        ge=1,
        le=10**9,
    )


class CaptionShuffleFields(OptionSection):
    """The keys of caption_shuffle."""

    enable: bool = option(False, "Whether the variants are made.")
    count: int = option(
        1, "Number of variants of each caption.", unit="variants", ge=1, le=MAX_VARIANTS
    )
    seed: int | None = option(
        None, "Seed of the variants; null is the seed of the run.", ge=0, le=2**63 - 1
    )
    split_on: Literal["comma", "space", "period"] = option("comma", "What divides the tags.")
    position_start: int = option(
        0, "How many of the first tags stay first, in their order.", unit="tags", ge=0, le=10**6
    )
    include_original: bool = option(True, "Whether the caption itself is used, too.")
    reorder: bool = option(True, "Whether the tags are put in another order.")
    tag_dropout: float = option(
        0.0,
        "Probability that a tag after position_start is left out of a variant; one tag is always "
        "left.",
        ge=0,
        lt=1,
    )


SHUFFLE_KEYS = section_options("caption_shuffle", CaptionShuffleFields)


def read_caption_shuffle(value: Mapping[str, Any] | None) -> CaptionVariants | None:
    """Return the variants that the object asks for; None where it asks for none.

    Raises ConfigError with what is wrong in it.
    """
    problems: list[str] = []
    given: dict[str, Any] = {}
    for key, raw in (value or {}).items():
        if key not in SHUFFLE_KEYS:
            problems.append(f"{key}: unknown{did_you_mean(key, SHUFFLE_KEYS)}")
            continue
        try:
            given[key] = parse_value(SHUFFLE_KEYS[key], raw)
        except InvalidOptionValue as error:
            problems.append(f"{key}: {error}")
    given = {key: parsed for key, parsed in given.items() if parsed is not None}
    fields = validate_section(
        CaptionShuffleFields, given, lambda key, message: problems.append(message)
    )
    if fields.enable and not fields.reorder and not fields.tag_dropout:
        problems.append("with reorder false it needs a tag_dropout, or all variants are equal")
    if problems:
        raise ConfigError("; ".join(problems))
    if not fields.enable:
        return None
    return CaptionVariants(**fields.model_dump(exclude={"enable"}))


def read_active_period(fields: VariationFields) -> ActivePeriod:
    """Return when the dataset is trained on. Raises ConfigError where it never is."""
    first_epoch = max(1, fields.start_epoch)
    if fields.end_epoch is not None and fields.end_epoch < first_epoch:
        raise ConfigError(f"end_epoch {fields.end_epoch} is before start_epoch {first_epoch}")
    if fields.end_step is not None and fields.end_step <= fields.start_step:
        raise ConfigError(f"end_step {fields.end_step} is not after start_step {fields.start_step}")
    return ActivePeriod(first_epoch, fields.end_epoch, fields.start_step, fields.end_step)


def read_filter_field(
    value: str | list[str] | None, resolve: Callable[[str], Path]
) -> tuple[str, ...]:
    """Return the filters; none without a value. Raises ConfigError with what is wrong in them."""
    return read_filters(value, resolve) if value else ()
