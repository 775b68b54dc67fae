"""The schema as the pages show it: what may be set here, what belongs to what, and settings for a card."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from simpletuner.config.constraints import STANDARD_LORA_OPTIONS
from simpletuner.config.option_catalog import Option, all_options
from simpletuner.config.presets import NANO_PRESET, preset_for_memory
from simpletuner.config.schema import AdapterOptions
from simpletuner.data.dataset_fields import COMMON_FIELDS, IMAGE_FIELDS
from simpletuner.server.schemas.configs import FormSchema, OptionInfo, Preset

# Refused in everything that comes through the server: what leaves the allowed folders or this machine.
NOT_SETTABLE: Mapping[str, str] = {
    "webhook_config": "sends what happens to an address; write it into a config file and train from there",
    "data_backend_config": "is written by the server from the list of datasets",
}

ONLY_LORA, ONLY_EMA, ONLY_VALIDATION = (
    {"model_type": ["lora"]},
    {"use_ema": [True]},
    {"validation_disable": [False]},
)
ONLY_STANDARD_LORA = {**ONLY_LORA, "lora_type": ["standard"]}
QUANTIZATION_SCHEMES = ["int8", "int4", "nf4", "fp8"]
DECAYING_SCHEDULERS = ["linear", "cosine", "polynomial"]
# Option -> where it is shown: every option named there has one of the values.
OPTION_NEEDS: Mapping[str, Mapping[str, list[Any]]] = {
    **dict.fromkeys(AdapterOptions.model_fields, ONLY_LORA),
    **dict.fromkeys(STANDARD_LORA_OPTIONS, ONLY_STANDARD_LORA),
    "lycoris_config": {**ONLY_LORA, "lora_type": ["lycoris"]},
    **dict.fromkeys(("base_model_precision", "musubi_blocks_to_swap"), ONLY_LORA),
    "quantize_via": {"base_model_precision": QUANTIZATION_SCHEMES},
    "quantized_cache_dir": {"base_model_precision": QUANTIZATION_SCHEMES},
    "dynamo_mode": {"dynamo_backend": ["inductor"]},
    **dict.fromkeys(("ema_decay", "ema_update_interval", "ema_device", "ema_validation"), ONLY_EMA),
    "lr_end": {"lr_scheduler": DECAYING_SCHEDULERS},
    "lr_power": {"lr_scheduler": ["polynomial"]},
    "missing_caption": {"caption_strategy": ["textfile", "filename"]},
    "huber_schedule": {"loss_type": ["huber", "smooth_l1"]},
    "huber_c": {"loss_type": ["huber", "smooth_l1"]},
    "flow_beta_schedule_alpha": {"chroma_sigma_density": ["beta"]},
    "flow_beta_schedule_beta": {"chroma_sigma_density": ["beta"]},
    "flow_sigmoid_scale": {
        "chroma_sigma_density": ["quadratic", "quadratic-literal", "logit-normal"]
    },
    **dict.fromkeys(
        (
            "validation_prompt",
            "user_prompt_library",
            "validation_negative_prompt",
            "validation_resolution",
            "validation_guidance_real",
            "validation_num_inference_steps",
            "num_validation_images",
            "validation_seed",
            "disable_benchmark",
        ),
        ONLY_VALIDATION,
    ),
    "validation_strengths": {**ONLY_LORA, **ONLY_VALIDATION},
    "evaluation_type": {"model_flavour": ["nano"]},
    "evaluation_prompts": {"model_flavour": ["nano"]},
    "evaluation_step_interval": {"model_flavour": ["nano"]},
}

DATASET_FIELD_NEEDS: Mapping[str, Mapping[str, list[Any]]] = {
    "crop_style": {"crop": [True]},
    "crop_aspect": {"crop": [True]},
    "crop_aspect_buckets": {"crop": [True], "crop_aspect": ["closest"]},
}
BASIC_DATASET_FIELDS = ("id", "dataset_type", "instance_data_dir", "caption_strategy", "repeats")
HIDDEN_DATASET_FIELDS = ("type", "disable")  # one value only; another spelling of disabled

PRESET_MEMORY_GB = (8, 12, 16, 24, 80)


@functools.cache
def build_form_schema() -> FormSchema:
    """Every option in the schema's order, every field of a dataset, the presets."""
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
    """Cards in order of memory, each with the finest base that fits, then the bundled model."""
    made = []
    for size in PRESET_MEMORY_GB:
        row, planned = preset_for_memory(size * 10**9)
        config = {
            name: value for name, value in row.items() if value != all_options()[name].default
        }
        made.append(Preset(id=f"{size}gb", title=f"{size} GB", planned_gb=planned, config=config))
    return [
        *made,
        Preset(id="nano", title="chroma-nano", planned_gb=None, config=dict(NANO_PRESET)),
    ]


def _option_info(option: Option) -> OptionInfo:
    told = {key: value for key, value in asdict(option).items() if key in OptionInfo.model_fields}
    settable = option.name not in NOT_SETTABLE
    needs = dict(
        (DATASET_FIELD_NEEDS if option.section == "dataset" else OPTION_NEEDS).get(option.name, {})
    )
    told["choices"] = list(option.choices)
    return OptionInfo(**told, takes=option.takes, settable=settable, needs=needs)


def _dataset_field_info(option: Option) -> OptionInfo:
    """Where the run has an option of the same name, null takes that one's value."""
    of_run, level = (
        option.name in all_options(),
        "basic" if option.name in BASIC_DATASET_FIELDS else "common",
    )
    default = None if of_run or option.default == "" else option.default
    nullable = of_run or option.nullable
    dataset = replace(option, section="dataset", group="Dataset", level=level, nullable=nullable)
    return _option_info(replace(dataset, default=default))
