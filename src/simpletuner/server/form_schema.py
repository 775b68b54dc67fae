"""The option schema for the form: which options can be set and have an effect, and presets."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from simpletuner.config.option import NeedGroup
from simpletuner.config.option_catalog import Option, all_options
from simpletuner.config.presets import NANO_PRESET, preset_for_memory
from simpletuner.data.dataset_fields import COMMON_FIELDS, IMAGE_FIELDS
from simpletuner.data.source_fields import SOURCE_FIELDS
from simpletuner.server.schemas.configs import FormSchema, OptionInfo, Preset

# Rejected in every configuration sent to the server, because they reach beyond its folders or
# machine.
NOT_SETTABLE: Mapping[str, str] = {
    "webhook_config": "sends events to a URL; set it in a config file and train from a terminal",
    "data_backend_config": "is written by the server from the list of datasets",
    "cache_remote": "writes to another server; set it in a config file and train from a terminal",
    **dict.fromkeys(
        ("num_machines", "machine_rank", "main_process_ip", "main_process_port"),
        "connects this machine to others; set it in a config file and train from a terminal",
    ),
    "accelerate_visible_devices": (
        "chooses GPUs, which the server does for each job; set CUDA_VISIBLE_DEVICES for the server"
    ),
    "accelerate_config": (
        "may connect this machine to others; set the options themselves, or train from a terminal"
    ),
}

BASIC_DATASET_FIELDS = ("id", "dataset_type", "instance_data_dir", "caption_strategy", "repeats")
# Pages show local folders; `disable` is an alias of `disabled`.
HIDDEN_DATASET_FIELDS = ("type", "disable", *SOURCE_FIELDS)

PRESET_MEMORY_GB = (8, 12, 16, 24, 80)


@functools.cache
def build_form_schema() -> FormSchema:
    """Return all options in the schema's order, all dataset fields, and the presets."""
    fields = {
        name: field
        for name, field in {**COMMON_FIELDS, **IMAGE_FIELDS}.items()
        if name not in HIDDEN_DATASET_FIELDS
    }
    return FormSchema(
        options=[_option_info(option) for option in all_options().values()],
        dataset_fields=[_dataset_field_info(field) for field in fields.values()],
        presets=list_presets(),
    )


def list_presets() -> list[Preset]:
    """Return a preset per GPU size with the most precise base that fits, and the nano preset."""
    presets = []
    for size in PRESET_MEMORY_GB:
        row, planned = preset_for_memory(size * 10**9)
        config = {
            name: value for name, value in row.items() if value != all_options()[name].default
        }
        presets.append(
            Preset(id=f"{size}gb", title=f"{size} GB", planned_gb=planned, config=config)
        )
    return [
        *presets,
        Preset(id="nano", title="chroma-nano", planned_gb=None, config=dict(NANO_PRESET)),
    ]


def _option_info(option: Option) -> OptionInfo:
    info = {key: value for key, value in vars(option).items() if key in OptionInfo.model_fields}
    settable = option.name not in NOT_SETTABLE
    info["choices"] = list(option.choices)
    info["aliases"] = list(option.aliases)
    info["needs"] = _needs_to_json(group for group in option.needs if len(group) == 1)
    info["needs_any"] = _needs_to_json(group for group in option.needs if len(group) > 1)
    return OptionInfo(**info, takes=option.takes, settable=settable)


def _needs_to_json(groups: Iterable[NeedGroup]) -> dict[str, list[Any]]:
    return {need.option: need.to_json() for group in groups for need in group}


def _dataset_field_info(option: Option) -> OptionInfo:
    """Describe a dataset field; null inherits the run's option of the same name, if any."""
    inherits = option.name in all_options()
    level = "basic" if option.name in BASIC_DATASET_FIELDS else "common"
    default = None if inherits or option.default == "" else option.default
    nullable = inherits or option.nullable
    dataset = replace(option, section="dataset", group="Dataset", level=level, nullable=nullable)
    return _option_info(replace(dataset, default=default))
