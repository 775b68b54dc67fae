"""Fields and options that have no effect with the values of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from simpletuner.config.constraints import format_no_effect, unmet_error
from simpletuner.config.option import find_unmet_need
from simpletuner.config.option_catalog import all_options
from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_fields import IMAGE_FIELDS, UNNEEDED_FIELDS


def format_unneeded(names_by_field: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield one notice for each field that is not needed, naming up to three datasets with it."""
    for key, names in names_by_field.items():
        reason = UNNEEDED_FIELDS[key]
        if len(names) == 1:
            yield f"{names[0]}.{key} is not needed: {reason}"
            continue
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{key} is not needed in {', '.join(names[:3])}{more}: {reason}"


def find_ineffective_fields(
    values: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[tuple[str, str | None, str]]:
    """Yield (field, error, notice) for each given field without effect.

    values: the effective values of a dataset. error: None where the field is only ignored.
    """
    for key in given:
        option = IMAGE_FIELDS[key]
        group = find_unmet_need(option.needs, values.__getitem__)
        if group is not None and values[key] != option.idle_value:
            notice = format_no_effect([key], group, values.__getitem__)
            yield key, unmet_error(option, group), notice


def find_ineffective_run_options(
    run_options: DataOptions, dataset_values: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield a notice for each of the run's data options that has an effect on no dataset."""
    for option in all_options().values():
        if option.section != "data" or not option.needs or not dataset_values:
            continue
        if dict(run_options)[option.name] == option.idle_value:
            continue
        unmet = [find_unmet_need(option.needs, values.__getitem__) for values in dataset_values]
        if unmet[0] is not None and all(unmet):
            yield format_no_effect([option.name], unmet[0], dataset_values[0].__getitem__)
