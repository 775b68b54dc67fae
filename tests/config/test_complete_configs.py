"""Whole configurations as SimpleTuner's users have them, for Chroma or changed to it, are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.load import ConfigLoadResult, try_load_config
from tests.config.foreign_keys import COMPLETE

LOKR = {
    "algo": "lokr",
    "multiplier": 1.0,
    "full_matrix": True,
    "bypass_mode": True,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 4,
    "apply_preset": {
        "target_module": ["Flux2Attention", "Flux2FeedForward"],
        "module_algo_map": {"Flux2Attention": {"factor": 2}, "Flux2FeedForward": {"factor": 4}},
    },
}
LYCORIS = {
    "lora_type": "lycoris",
    "lycoris_config": "config/lycoris_config.json",
    "validation_lycoris_strength": 1.0,
    "lora_rank": 16,
    "lora_alpha": 16,
}
FULL = {"model_type": "full", "base_model_precision": "no_change", "lora_type": None}
# What a user changes in COMPLETE, by what the configuration is about.
READ: dict[str, dict[str, Any]] = {
    "a LoKr of another model": LYCORIS,
    "a small card": {
        "model_family": "chroma",
        "ramtorch": True,
        "ramtorch_target_modules": "*",
        "vae_enable_tiling": True,
        "gradient_checkpointing_interval": 2,
        "offload_during_startup": True,
        "attention_mechanism": "sageattention",
        "text_encoder_1_precision": "int4-quanto",
        "text_encoder_4_precision": "int4-quanto",
    },
    "regularisers that are off": {
        "crepa_enabled": False,
        "crepa_block_index": 8,
        "crepa_encoder": "dinov2_vitg14",
        "crepa_lambda": 0.5,
        "layersync_enabled": False,
        "flow_schedule_auto_shift": False,
        "flow_schedule_shift": 6.9,
        "aspect_bucket_alignment": 16,
        "tokenizer_max_length": 8192,
        "dataloader_prefetch": False,
        "disable_assistant_lora": True,
        "resume_from_checkpoint": "",
        "vae_dtype": "fp32",
    },
    "options of other models": {
        "ideogram_auto_json": True,
        "ideogram_schedule_mu": 0.0,
        "moss_image_validation_shift": 3.0,
        "flux3_prompt_upsample": False,
        "validation_guidance_skip_layers": [7, 8, 9],
        "trust_remote_code": True,
        "pretrained_vae_model_name_or_path": "madebyollin/sdxl-vae-fp16-fix",
        "validation_guidance_rescale": 0.7,
    },
    "another optimizer": {
        "optimizer": "optimi-lion",
        "optimizer_config": "weight_decay=0.0",
        "max_grad_norm": 0.01,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 100,
    },
    "a moving average": {
        "use_ema": True,
        "ema_decay": 0.999,
        "ema_warmup_steps": 1000,
        "ema_cpu_only": True,
        "ema_validation": "comparison",
    },
    "full rank with DeepSpeed": {
        **FULL,
        "deepspeed_config": {"zero_optimization": {"stage": 2}},
        "optimizer": "adamw",
        "grad_clip_method": "norm",
    },
    "several GPUs": {
        "num_processes": 3,
        "accelerate_visible_devices": [0, 1, 2],
        "find_unused_parameters": True,
        "seed_for_each_device": True,
    },
    "scheduled sampling": {
        "scheduled_sampling_max_step_offset": 10,
        "scheduled_sampling_probability": 1.0,
        "scheduled_sampling_sampler": "unipc",
    },
    "evaluations": {
        "evaluation_type": "clip",
        "pretrained_evaluation_model_name_or_path": "openai/clip-vit-large-patch14-336",
        "eval_epoch_interval": 0.5,
        "eval_timesteps": 10,
        "num_eval_images": 25,
        "validation_preview": True,
    },
    "no validation during the run": {"validation_steps": 0, "validation_disable": False},
    "both names of an option": {"validation_steps": 250, "validation_step_interval": 250},
    "Discord": {"webhook_config": "config/webhooks.json"},
    "a model card": {
        "modelspec_comment": ["Training run: 42", "{env:TRAINING_NOTES}"],
        "hub_model_id": "owner/model",
        "push_to_hub": False,
        "model_card_base_model": "owner/base",
    },
    "trackers": {"report_to": "simpletuner,tensorboard", "tracker_image_layout": "table"},
    "caches elsewhere": {
        "vae_cache_ondemand": True,
        "cache_dir_vae": "/caches/vae",
        "compress_disk_cache": False,
        "skip_file_discovery": "vae aspect metadata text",
    },
}
# (what the user changes, why it cannot be read).
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "distillation": (
        {"distillation_method": "anyflow", "distillation_config": {"anyflow": {"stage": "a"}}},
        "makes a few-step generator",
    ),
    "an encoder's features": ({"crepa_enabled": True, "crepa_lambda": 0.5}, "is not offered"),
    "layers in step": ({"layersync_enabled": True}, "is not offered"),
    "ControlNet": ({"controlnet": True, "flux_lora_target": "controlnet"}, "of other models"),
    "a missing file": ({"init_lora": "output/other/pytorch_lora_weights.safetensors"}, "not exist"),
    "context parallel": ({"context_parallel_size": 2, "num_processes": 8}, "by one process"),
    "another algorithm": (
        {"lora_type": "lycoris", "lycoris_config": {"algo": "tlora", "linear_dim": 16}},
        "the nearest is lora_type",
    ),
}


def load(folder: Path, changes: dict[str, Any], form: bool = False) -> ConfigLoadResult:
    (folder / "config").mkdir(exist_ok=True)
    hooks = {"webhook_type": "discord", "webhook_url": "https://discord.example/api/webhooks/1/a"}
    for name, content in (("lycoris_config", LOKR), ("webhooks", hooks)):
        (folder / f"config/{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "multidatabackend.json").write_text("[]", encoding="utf-8")
    options = {**COMPLETE, **changes}
    if "validation_step_interval" in changes:
        options["validation_steps"] = changes["validation_steps"]
    if form:
        options = {f"--{name}": value for name, value in options.items()}
    whole = {"_metadata": {"name": "mine"}, "config": options} if form else options
    (folder / "config/config.json").write_text(json.dumps(whole), encoding="utf-8")
    environ = {"TRAINING_NOTES": "second try"}
    return try_load_config(config_path="config/config.json", environ=environ, cwd=folder)


@pytest.mark.parametrize("form", [False, True], ids=["file", "form"])
@pytest.mark.parametrize("name", READ)
def test_a_whole_configuration_is_read(name: str, form: bool, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/multidatabackend.json").write_text("[]", encoding="utf-8")
    result = load(tmp_path, READ[name], form)
    assert result.problems == ()
    assert result.loaded is not None
    assert not any("unknown" in notice for notice in result.loaded.notices)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_its_reason(name: str, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/multidatabackend.json").write_text("[]", encoding="utf-8")
    changes, reason = REFUSED[name]
    messages = [problem.message for problem in load(tmp_path, changes).problems]
    assert any(reason in message for message in messages), messages
    assert not any("unknown option" in message for message in messages)
