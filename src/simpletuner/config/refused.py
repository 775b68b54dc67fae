"""Options of SimpleTuner's that do not exist here, by name, with the reason or the replacement."""

from __future__ import annotations

import fnmatch

NOT_YET = "is not offered yet"

# reason -> names; a name may end in `*`
REFUSED: tuple[tuple[str, str], ...] = (
    ("use validation_guidance_real", "validation_guidance"),
    ("does nothing to Chroma", "validation_guidance_rescale flux_guidance_value flux_guidance_min "
     "flux_guidance_max flux_attention_masked_training noise_offset offset_noise timestep_bias_* snr_gamma "
     "snr_weight use_soft_min_snr soft_min_snr_sigma_data prediction_type train_text_encoder text_encoder_lr "
     "validation_using_datasets validation_stitch_input_location validation_guidance_skip_*"),
    ("quantisation " + NOT_YET, "quantize_via quantization_config quantize_activations sdnq_* "
     "text_encoder_1_precision text_encoder_2_precision text_encoder_3_precision text_encoder_4_precision"),
    ("is not needed: text encoder, VAE and transformer are never loaded together",
     "keep_vae_loaded offload_during_save"),
    ("moving weights between host and device " + NOT_YET, "enable_group_offload group_offload_* ramtorch "
     "ramtorch_* musubi_blocks_to_swap musubi_block_swap_device offload_param_path"),
    (NOT_YET + "; gradient_checkpointing and gradient_checkpointing_interval are",
     "gradient_checkpointing_backend gradient_checkpointing_segment_stride gradient_checkpointing_offload_*"),
    ("is not needed: captions are trimmed, so torch's own attention runs without a mask",
     "attention_mechanism sageattention_usage"),
    ("compiling the transformer " + NOT_YET, "dynamo_*"),
    ("training on several devices " + NOT_YET, "num_processes num_machines machine_rank main_process_ip "
     "main_process_port same_network accelerate_config accelerate_extra_args find_unused_parameters "
     "deepspeed_config fsdp_* context_parallel_* seed_for_each_device validation_multigpu"),
    (NOT_YET, "peft_lora_mode singlora_ramp_up_steps slider_lora_target slider_strength init_lora_ema "
     "init_lora_step init_lokr_norm lycoris_config validation_lycoris_strength assistant_lora_* "
     "disable_assistant_lora scheduled_sampling_* mixflow_* masked_loss_probability validation_preview* "
     "validation_adapter_* evaluation_type pretrained_evaluation_model_name_or_path ema_warmup_steps "
     "checkpointing_rolling_steps checkpoints_rolling_total_limit prodigy_steps gradient_precision "
     "optimizer_cpu_offload_method optimizer_offload_gradients optimizer_release_gradients fuse_optimizer"),
    (NOT_YET + "; the file is written in diffusers' layout", "lora_format"),
    ("publishing " + NOT_YET, "push_to_hub push_checkpoints_to_hub push_to_hub_background hub_model_id "
     "model_card_* modelspec_comment publishing_config post_upload_script"),
    ("use chroma_sigma_density", "flow_cubic_schedule_weights"),
    ("use input_perturbation alone: it does not fade", "input_perturbation_steps"),
    ("use adam_beta1", "optimizer_beta1"),
    ("use adam_beta2", "optimizer_beta2"),
    ("use ema_device", "ema_cpu_only"),
    ("cosine goes down once, over the whole run", "lr_num_cycles"),
    ("use num_train_epochs: a run ends exactly where it says", "strict_epoch_limit ignore_final_epochs"),
    ("is torch's business", "ema_foreach_disable set_grads_to_none accelerator_cache_clear_interval"),
    ("checkpoints are always written aside, checked and renamed; damaged ones are set aside, never deleted",
     "checkpointing_use_tempdir delete_invalid_checkpoints"),
    ("free space is checked before each checkpoint", "disk_low_threshold disk_low_action disk_low_script"),
    ("no program of yours is run from here; read events.jsonl, or use webhook_config",
     "post_checkpoint_script validation_method validation_external_* custom_tracker"),
    ("use validation_step_interval", "validation_epoch_interval validate_after_step validate_after_epoch"),
    ("the untouched base is drawn at step 0 unless disable_benchmark", "validation_on_startup"),
    ("no prompt is drawn that you did not write", "validation_disable_unconditional"),
    ("is fixed: seeds are drawn on the CPU and stay the same through a run, so that pictures compare",
     "validation_seed_source validation_randomize"),
    ("is fixed: Euler steps on the flow, as in training", "validation_noise_scheduler"),
    ("is fixed: PNG with its settings inside", "validation_image_format validation_image_quality"),
    ("use eval_sigma_count", "eval_timesteps"),
    ("use eval_steps_interval", "eval_epoch_interval"),
    ("held-out loss is measured when there is an eval dataset", "eval_loss_disable eval_dataset_pooling"),
    ("is fixed by the tracker or the event", "tracker_image_layout webhook_reporting_interval"),
    ("use cache_dir", "cache_dir_text cache_dir_vae"),
    ("the run's records lie in output_dir", "logging_dir"),
    ("point pretrained_transformer_model_name_or_path at the folder itself",
     "pretrained_transformer_subfolder pretrained_transformer_model_name_or_path_subfolder"),
    ("code from the hub is never run", "trust_remote_code"),
    ("nothing is deleted that this program did not write", "delete_model_after_load delete_unwanted_images "
     "delete_problematic_images delete_nsfw_images"),
    ("there are no locked options", "i_know_what_i_am_doing"),
    ("is fixed by the model: buckets are multiples of 64 px",
     "aspect_bucket_rounding aspect_bucket_alignment"),
    ("is not needed: a small bucket trains with a smaller batch", "allow_dataset_oversubscription "
     "disable_bucket_pruning"),
    ("is not needed: caches are keyed by content and settings, written once, rebuilt where they changed",
     "vae_cache_ondemand vae_cache_preprocess vae_cache_disable vae_cache_clear_each_epoch "
     "vae_cache_scan_behaviour text_cache_ondemand text_cache_disable text_embed_full_cache "
     "compress_disk_cache override_dataset_config skip_file_discovery preserve_data_backend_cache "
     "metadata_update_interval write_batch_size ignore_missing_files"),
    ("is not needed: reading ahead sizes itself", "read_batch_size image_processing_batch_size max_workers "
     "aspect_bucket_worker_count enable_multiprocessing dataloader_prefetch dataloader_prefetch_qlen"),
    ("use log_level debug",
     "print_filenames print_sampler_statistics debug_aspect_buckets debug_dataset_loader"),
    ("belongs in the dataset file (data_backend_config)", "instance_data_dir crop crop_style crop_aspect "
     "crop_aspect_buckets repeats probability max_num_samples dataset_type max_upscale_threshold "
     "disable_multiline_split caption_shuffle timestep_sampling_offset is_regularisation_data"),
    ("regularisers and distillation are not offered", "crepa_* repa_* layersync_* twinflow_* nextlat_* "
     "distillation_* tread_config controlnet controlnet_*"),
)  # fmt: skip

# What people ask for by name and always get; saying so is a note, not a mistake.
ALWAYS = {
    "offload_during_startup": "always so: text encoder, VAE and transformer are never in memory together",
}

OFF = (None, False, 0, "", "false", "none", "no", "no_change", "[]", "{}")


def reason_refused(name: str) -> str | None:
    """Why an option of SimpleTuner's is not here: "use adam_beta1". None for any other name."""
    for reason, names in REFUSED:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in names.split()):
            return reason
    return None


def is_off(value: object) -> bool:
    """Whether a refused option is only said to be off, as files saved by a form say of hundreds."""
    return (value.lower() if isinstance(value, str) else value) in OFF or value in ([], {})
