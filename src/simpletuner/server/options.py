"""The schema as the pages show it: what may be set here, what belongs to what, and settings for a card."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from simpletuner.config.catalog import Option, catalog
from simpletuner.config.proposals import NANO, for_memory
from simpletuner.config.rules import PAIRS_ONLY
from simpletuner.config.schema import AdapterOptions
from simpletuner.data.fields import PICTURES, SHARED
from simpletuner.server.wire.configs import OptionInfo, Preset, Schema

# Refused in everything that comes through the server: what leaves the allowed folders or this machine.
NOT_SETTABLE: Mapping[str, str] = {
    "webhook_config": "sends what happens to an address; write it into a config file and train from there",
    "data_backend_config": "is written by the server from the list of datasets",
}

LORA, EMA, DRAWN = {"model_type": ["lora"]}, {"use_ema": [True]}, {"validation_disable": [False]}
PAIRS = {**LORA, "lora_type": ["standard"]}
QUANTISED = ["int8", "int4", "nf4", "fp8"]
COURSES = ["linear", "cosine", "polynomial"]
# Option -> where it is shown: every option named there has one of the values.
NEEDS: Mapping[str, Mapping[str, list[Any]]] = {
    **dict.fromkeys(AdapterOptions.model_fields, LORA),
    **dict.fromkeys(PAIRS_ONLY, PAIRS),
    "lycoris_config": {**LORA, "lora_type": ["lycoris"]},
    **dict.fromkeys(("base_model_precision", "musubi_blocks_to_swap"), LORA),
    "quantize_via": {"base_model_precision": QUANTISED},
    "quantized_cache_dir": {"base_model_precision": QUANTISED},
    "dynamo_mode": {"dynamo_backend": ["inductor"]},
    **dict.fromkeys(("ema_decay", "ema_update_interval", "ema_device", "ema_validation"), EMA),
    "lr_end": {"lr_scheduler": COURSES},
    "lr_power": {"lr_scheduler": ["polynomial"]},
    "missing_caption": {"caption_strategy": ["textfile", "filename"]},
    "huber_schedule": {"loss_type": ["huber", "smooth_l1"]},
    "huber_c": {"loss_type": ["huber", "smooth_l1"]},
    "flow_beta_schedule_alpha": {"chroma_sigma_density": ["beta"]},
    "flow_beta_schedule_beta": {"chroma_sigma_density": ["beta"]},
    "flow_sigmoid_scale": {"chroma_sigma_density": ["quadratic", "quadratic-literal", "logit-normal"]},
    **dict.fromkeys(
        (
            "validation_prompt", "user_prompt_library", "validation_negative_prompt", "validation_resolution",
            "validation_guidance_real", "validation_num_inference_steps", "num_validation_images",
            "validation_seed", "disable_benchmark",
        ),
        DRAWN,
    ),
    "validation_strengths": {**LORA, **DRAWN},
    "evaluation_type": {"model_flavour": ["nano"]},
    "evaluation_prompts": {"model_flavour": ["nano"]},
    "evaluation_step_interval": {"model_flavour": ["nano"]},
}  # fmt: skip

FIELD_NEEDS: Mapping[str, Mapping[str, list[Any]]] = {
    "crop_style": {"crop": [True]},
    "crop_aspect": {"crop": [True]},
    "crop_aspect_buckets": {"crop": [True], "crop_aspect": ["closest"]},
}
BASIC_FIELDS = ("id", "dataset_type", "instance_data_dir", "caption_strategy", "repeats")
FIELDS_LEFT_OUT = ("type", "disable")  # one value only; another spelling of disabled

CARDS_GB = (8, 12, 16, 24, 80)


@functools.cache
def schema() -> Schema:
    """Every option in the schema's order, every field of a dataset, the presets."""
    fields = {name: field for name, field in {**SHARED, **PICTURES}.items() if name not in FIELDS_LEFT_OUT}
    return Schema(
        options=[_option(option) for option in catalog().values()],
        dataset_fields=[_field(field) for field in fields.values()],
        presets=presets(),
    )


def presets() -> list[Preset]:
    """Cards in order of memory, each with the finest base that fits, then the bundled model."""
    made = []
    for size in CARDS_GB:
        row, planned = for_memory(size * 10**9)
        config = {name: value for name, value in row.items() if value != catalog()[name].default}
        made.append(Preset(id=f"{size}gb", title=f"{size} GB", planned_gb=planned, config=config))
    return [*made, Preset(id="nano", title="chroma-nano", planned_gb=None, config=dict(NANO))]


def _option(option: Option) -> OptionInfo:
    told = {key: value for key, value in asdict(option).items() if key in OptionInfo.model_fields}
    settable = option.name not in NOT_SETTABLE
    needs = dict((FIELD_NEEDS if option.section == "dataset" else NEEDS).get(option.name, {}))
    told["choices"] = list(option.choices)
    return OptionInfo(**told, takes=option.takes, settable=settable, needs=needs)


def _field(option: Option) -> OptionInfo:
    """Where the run has an option of the same name, null takes that one's value."""
    of_run, level = option.name in catalog(), "basic" if option.name in BASIC_FIELDS else "common"
    default = None if of_run or option.default == "" else option.default
    nullable = of_run or option.nullable
    dataset = replace(option, section="dataset", group="Dataset", level=level, nullable=nullable)
    return _option(replace(dataset, default=default))
