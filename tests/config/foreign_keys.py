"""Every key of SimpleTuner's example configurations that needed attention, and what happens to it.

One row per key and value. outcome: "works" (read as an option of ours), "noted" (the run starts, a
notice says why the key changes nothing), or a part of the message that refuses it, which names
another model, another device, a method that is not here, or a file that does not exist.
"""

from __future__ import annotations

from typing import Any

NO_REGULARISER = "regularisers and distillation are not supported"
OTHER_MODEL = "is a method of other models"
SECOND_MODEL = "needs features of a second model"

CONFIG_KEYS: list[tuple[str, Any, str]] = [
    ("validation_guidance", 3.0, "works"),
    ("tread_config", {"routes": [{"end_layer_idx": -2, "selection_ratio": 0.5}]}, OTHER_MODEL),
    ("distillation_method", "anyflow", NO_REGULARISER),
    ("distillation_config", {"anyflow": {"stage": "forward"}}, NO_REGULARISER),
    ("crepa_enabled", True, SECOND_MODEL),
    ("controlnet", True, OTHER_MODEL),
    ("deepspeed_config", {"zero_optimization": {"stage": 2}}, "works"),
    ("scheduled_sampling_max_step_offset", 10, "works"),
    ("scheduled_sampling_probability", 1.0, "works"),
    ("validation_preview", True, "needs a second model"),
    ("xm_enabled", True, NO_REGULARISER),
    ("xm_candidate_count", 4, "noted"),
    ("xm_training_target", "noise", "noted"),
    ("xm_selection_scope", "sample", "noted"),
    ("xm_block_size", 0, "noted"),
    ("gradient_checkpointing_backend", "torch-ffn", "works"),
    ("optimizer", "bnb-lion8bit", "works"),
    ("vae_cache_ondemand", True, "noted"),
    ("webhook_config", "config/webhooks.json", "does not exist"),
    ("flux_lora_target", "controlnet", "there is no ControlNet"),
    ("accelerate_visible_devices", [0, 1, 2], "works"),
    ("num_processes", 3, "works"),
    ("hub_model_name", "your-model-name", "works"),
    ("dynamo_mode", "max-autotune", "works"),
    (
        "modelspec_comment",
        ["Training run: 42", "{env:TRAINING_NOTES}"],
        "TRAINING_NOTES is not set",
    ),
    ("modelspec_comment", ["Training run: experiment-42", "Dataset: custom-portraits-v3"], "works"),
    ("attention_mechanism", "flex", "noted"),
    ("twinflow_enabled", True, NO_REGULARISER),
    ("init_lora", "path-or-repo-to-an-adapter", "does not exist"),
    ("optimizer_beta1", 0.9, "works"),
    ("optimizer_beta2", 0.999, "works"),
    ("optimizer_weight_decay", 0.0, "works"),
    ("base_model_precision", "int8-sdnq", "works"),
    ("diffusion_blocks_config", {"layers_per_block": 4, "overlap": 0.05}, NO_REGULARISER),
    ("find_unused_parameters", True, "noted"),
    ("urepa_enabled", True, SECOND_MODEL),
    ("urepa_scheduler", "cosine", "noted"),
    ("urepa_warmup_steps", 100, "noted"),
    ("urepa_cutoff_step", 5000, "noted"),
    ("urepa_lambda", 0.5, "noted"),
    ("urepa_manifold_weight", 3.0, "noted"),
    ("urepa_model", "dinov2_vitg14", "noted"),
    ("urepa_encoder_image_size", 518, "noted"),
    ("internal_guidance_enabled", True, NO_REGULARISER),
    ("internal_guidance_loss_weight", 0.5, "noted"),
    ("internal_guidance_block_index", 7, "noted"),
    ("validation_internal_guidance_scale", 1.4, "noted"),
    ("irepa_enabled", True, SECOND_MODEL),
    ("irepa_spatial_norm_alpha", 0.6, "noted"),
    ("irepa_projector_kernel_size", 3, "noted"),
    ("layersync_enabled", True, NO_REGULARISER),
    ("mixflow_enabled", True, "works"),
    ("nextlat_enabled", True, NO_REGULARISER),
    ("nextlat_block_index", -1, "noted"),
    ("nextlat_weight", 0.05, "noted"),
    ("nextlat_state_loss", "smooth_l1", "noted"),
    ("gradient_checkpointing_segment_stride", 4, "noted"),
    ("lycoris_config", "config/lycoris_tlora.json", "does not exist"),
    ("validation_image_format", "webp", "noted"),
    ("report_to", "simpletuner", "works"),
    ("report_to", "simpletuner,tensorboard", "works"),
    ("pretrained_vae_model_name_or_path", "madebyollin/sdxl-vae-fp16-fix", "noted"),
    ("flux_lora_target", "mmdit", "works"),
    ("flux_lora_target", "ai-toolkit", "works"),
    ("keep_vae_loaded", True, "noted"),
    ("max_workers", 16, "noted"),
    ("read_batch_size", 10, "noted"),
    ("fuse_qkv_projections", True, "noted"),
    ("skip_file_discovery", "vae aspect", "noted"),
]
