"""Options of SimpleTuner's that do not exist here, by name, with the reason or the replacement."""

from __future__ import annotations

import fnmatch
import functools

NOT_YET_REASON = "is not offered yet"

# reason -> names. A name may hold `*`; the first that fits counts. name=a|b: these values are SimpleTuner's
# default or ask for what happens anyway, so they are skipped, as is every value of name=*, which does nothing
# without another refused option.
UNSUPPORTED_OPTIONS: tuple[tuple[str, str], ...] = (
    ("use validation_guidance_real", "validation_guidance"),
    ("use validation_strengths", "validation_lycoris_strength=1"),
    (
        "does nothing to Chroma",
        "validation_guidance_rescale flux_guidance_value=* flux_guidance_min=* "
        "flux_guidance_max=* flux_attention_masked_training noise_offset=0.1 noise_offset_probability=* "
        "offset_noise timestep_bias_strategy timestep_bias_*=* snr_gamma snr_weight=1 use_soft_min_snr "
        "soft_min_snr_sigma_data prediction_type train_text_encoder text_encoder_lr text_encoder_limit=* "
        "freeze_encoder=* freeze_encoder_*=* save_text_encoder layer_freeze_strategy rescale_betas_zero_snr "
        "training_scheduler_timestep_spacing=trailing inference_scheduler_timestep_spacing=trailing "
        "validation_using_datasets validation_stitch_input_location=* validation_guidance_skip_layers "
        "validation_guidance_skip_*=* validation_no_cfg_until_timestep=2 enable_watermark",
    ),
    (
        "Chroma has one text encoder; use text_encoder_1_precision",
        "text_encoder_2_precision text_encoder_3_precision text_encoder_4_precision",
    ),
    (
        "use base_model_precision: weights alone are quantised, each scheme in one way",
        "quantization_config quantize_activations sdnq_*=*",
    ),
    (
        "is not needed: text encoder, VAE and transformer are loaded one after the other",
        "keep_vae_loaded offload_during_save fully_unload_text_encoder=true",
    ),
    (
        "use musubi_blocks_to_swap",
        "enable_group_offload group_offload_*=* enable_model_cpu_offload ramtorch "
        "ramtorch_*=* offload_param_path",
    ),
    ("is fixed: swapped blocks wait in host memory", "musubi_block_swap_device=cpu"),
    (
        "use gradient_checkpointing = a number of blocks, or gradient_checkpointing_backend offload",
        "gradient_checkpointing_segment_stride gradient_checkpointing_offload_attention "
        "gradient_checkpointing_offload_*=*",
    ),
    (
        "is not needed: captions are trimmed, so torch's own attention runs without a mask",
        "attention_mechanism=diffusers sageattention_usage=inference sla_config fuse_qkv_projections",
    ),
    (
        "is fixed: dynamo_backend compiles each block, for any shape, in training and validation",
        "dynamo_fullgraph dynamo_dynamic=true dynamo_use_regional_compilation=true "
        "validation_torch_compile=true validation_torch_compile_mode=*",
    ),
    (
        "training on several devices " + NOT_YET_REASON,
        "num_processes=1 num_machines=1 machine_rank main_process_*=* "
        "same_network=* accelerate_config accelerate_extra_args find_unused_parameters deepspeed_config "
        "fsdp_enable fsdp_*=* context_parallel_size=1 context_parallel_*=* seed_for_each_device=true "
        "validation_multigpu=* local_rank=-1",
    ),
    (
        NOT_YET_REASON,
        "peft_lora_mode=standard singlora_ramp_up_steps=* slider_lora_target slider_strength "
        "init_lora_ema init_lora_step init_lokr_norm "
        "assistant_lora_path assistant_lora_*=* disable_assistant_lora scheduled_sampling_probability "
        "scheduled_sampling_max_step_offset scheduled_sampling_reflexflow scheduled_sampling_*=* "
        "mixflow_enabled mixflow_*=* masked_loss_probability=1 validation_preview validation_preview_steps=* "
        "validation_adapter_path validation_adapter_*=* ema_warmup_steps "
        "pretrained_evaluation_model_name_or_path=* checkpointing_rolling_steps gradient_precision=unmodified "
        "checkpoints_rolling_total_limit=* prodigy_steps",
    ),
    (
        "use optimizer_release_gradients: then there are no gradients to move",
        "optimizer_offload_gradients",
    ),
    (
        "uploads go to the hub alone, always in the background; use push_to_hub",
        "push_to_hub_background=* publishing_config post_upload_script",
    ),
    ("use chroma_sigma_density", "flow_cubic_schedule_weights"),
    ("use stratified_sigmas", "disable_segmented_timestep_sampling"),
    ("use input_perturbation alone: it does not fade", "input_perturbation_steps"),
    ("use adam_beta1", "optimizer_beta1"),
    ("use adam_beta2", "optimizer_beta2"),
    ("use ema_device", "ema_cpu_only"),
    ("cosine goes down once, over the whole run", "lr_num_cycles=1"),
    (
        "use num_train_epochs: a run ends exactly where it says",
        "strict_epoch_limit=true ignore_final_epochs",
    ),
    (
        "is torch's business",
        "ema_foreach_disable set_grads_to_none=true accelerator_cache_clear_interval",
    ),
    (
        "checkpoints are always written aside, checked and renamed; damaged ones are set aside, never deleted",
        "checkpointing_use_tempdir=true delete_invalid_checkpoints",
    ),
    (
        "free space is checked before each checkpoint",
        "disk_low_threshold disk_low_action=stop disk_low_script",
    ),
    (
        "no program of yours is run from here; read events.jsonl, or use webhook_config",
        "post_checkpoint_script validation_method=simpletuner-local validation_external_* custom_tracker",
    ),
    (
        "use validation_step_interval",
        "validation_epoch_interval validate_after_step validate_after_epoch",
    ),
    ("the untouched base is drawn at step 0 unless disable_benchmark", "validation_on_startup"),
    ("no prompt is drawn that you did not write", "validation_disable_unconditional=true"),
    (
        "is fixed: seeds are drawn on the CPU and stay the same through a run, so that pictures compare",
        "validation_seed_source=cpu validation_randomize",
    ),
    ("is fixed: Euler steps on the flow, as in training", "validation_noise_scheduler=euler"),
    (
        "is fixed: PNG with its settings inside",
        "validation_image_format=png validation_image_quality=*",
    ),
    ("use eval_sigma_count", "eval_timesteps=28"),
    ("use eval_steps_interval", "eval_epoch_interval"),
    (
        "held-out loss is measured when there is an eval dataset",
        "eval_loss_disable eval_dataset_pooling",
    ),
    (
        "is fixed by the tracker or the event",
        "tracker_image_layout=gallery webhook_reporting_interval",
    ),
    ("use cache_dir", "cache_dir_text=cache cache_dir_vae"),
    ("the run's records lie in output_dir", "logging_dir=logs"),
    (
        "point pretrained_transformer_model_name_or_path at the folder itself",
        ""
        "pretrained_transformer_subfolder=transformer pretrained_transformer_model_name_or_path_subfolder",
    ),
    ("code from the hub is never run", "trust_remote_code"),
    (
        "nothing is deleted that this program did not write",
        "delete_model_after_load delete_unwanted_images "
        "delete_problematic_images delete_nsfw_images",
    ),
    ("there are no locked options", "i_know_what_i_am_doing=*"),
    (
        "is fixed by the model: buckets are multiples of 64 px",
        "aspect_bucket_rounding=2 aspect_bucket_alignment=64",
    ),
    (
        "is not needed: a small bucket trains with a smaller batch",
        "allow_dataset_oversubscription=true disable_bucket_pruning=true",
    ),
    (
        "is not needed: caches are keyed by content and settings, written once, rebuilt where they changed",
        "vae_cache_ondemand vae_cache_preprocess=true vae_cache_disable vae_cache_clear_each_epoch "
        "vae_cache_scan_behaviour=recreate text_cache_ondemand text_cache_disable text_embed_full_cache "
        "compress_disk_cache=true override_dataset_config=true skip_file_discovery "
        "metadata_update_interval=3600 preserve_data_backend_cache write_batch_size=128 "
        "aspect_bucket_disable_rebuild ignore_missing_files",
    ),
    (
        "is not needed: reading ahead sizes itself",
        "read_batch_size=25 image_processing_batch_size=32 "
        "max_workers=32 aspect_bucket_worker_count=12 enable_multiprocessing dataloader_prefetch=true "
        "dataloader_prefetch_qlen=10",
    ),
    (
        "use log_level debug",
        "print_filenames print_sampler_statistics debug_aspect_buckets debug_dataset_loader",
    ),
    (
        "belongs in the dataset file (data_backend_config)",
        "instance_data_dir crop crop_style crop_aspect "
        "crop_aspect_buckets repeats probability max_num_samples dataset_type max_upscale_threshold "
        "disable_multiline_split caption_shuffle timestep_sampling_offset is_regularisation_data",
    ),
    (
        "only local folders are read, without caption tables or paired pictures",
        "aws_*=* parquet_*=* conditioning_multidataset_sampling=*",
    ),
    (
        "regularisers and distillation are not offered",
        "crepa_enabled crepa_*=* repa_* layersync_enabled "
        "layersync_*=* twinflow_enabled twinflow_*=* nextlat_* distillation_* tread_config control controlnet "
        "controlnet_*=*",
    ),
    (
        "belongs to other models",
        "sd3_*=* sdxl_*=* sana_*=* hidream_*=* ltx_*=* ltxvideo_*=* wan_*=* "
        "hunyuan*=* qwen_*=* lumina*=* kandinsky*=* kolors_*=* cosmos*=* longcat*=* auraflow_*=* pixart_*=* "
        "omnigen*=* flux2_*=* zimage_*=* z_image_*=* ace_step_*=* refiner_*=* unet_*=* pretrained_unet_*=* "
        "framerate=* validation_num_video_frames=* vae_enable_patch_conv=* data_aesthetic_score=*",
    ),
)

# What people ask for by name and always get; saying so is a note, not a mistake.
ALWAYS_ON_OPTIONS = {
    "fuse_optimizer": "always so where torch can: AdamW is one pass without a temporary",
    "offload_during_startup": "always so: text encoder, VAE and transformer are loaded in turn, each alone",
}

OFF_VALUES = ("", "0", "0.0", "false", "no", "no_change", "none", "null", "[]", "{}")


@functools.cache
def _pattern_rows() -> tuple[tuple[str, tuple[str, ...], str], ...]:
    """(pattern of the name, values that are skipped, reason), in the order of the table."""
    words = [
        (word.partition("="), reason)
        for reason, names in UNSUPPORTED_OPTIONS
        for word in names.split()
    ]
    return tuple(
        (name, tuple(values.split("|")) if values else (), why) for (name, _, values), why in words
    )


def _match_pattern(name: str) -> tuple[tuple[str, ...], str | None]:
    """The values that are skipped, and the reason; none for a name that is not SimpleTuner's."""
    rows = (
        (values, why)
        for pattern, values, why in _pattern_rows()
        if fnmatch.fnmatchcase(name, pattern)
    )
    return next(rows, ((), None))


def unsupported_reason(name: str) -> str | None:
    """Why an option of SimpleTuner's is not here: "use adam_beta1". None for any other name."""
    return _match_pattern(name)[1]


def is_harmless_value(name: str, value: object) -> bool:
    """Whether a refused option is said to be off, or at a value that changes nothing: forms save hundreds."""
    skipped = _match_pattern(name)[0]
    word = f"{value:g}" if isinstance(value, float) else str(value).strip().lower()
    return word in OFF_VALUES or word in skipped or "*" in skipped


def unsupported_names_by_reason() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(reason, names) as the documents show them."""
    return tuple(
        (why, tuple(name.partition("=")[0] for name in names.split()))
        for why, names in UNSUPPORTED_OPTIONS
    )
