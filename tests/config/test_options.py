"""The declarations themselves, the table of what is refused, the rules between options, the
documents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config import docs
from simpletuner.config.load import try_load_config
from simpletuner.config.option_catalog import all_options, option_aliases
from simpletuner.config.unsupported_options import (
    is_harmless_value,
    unsupported_names_by_reason,
    unsupported_reason,
)

ROOT = Path(__file__).parents[2]

# what configurations of SimpleTuner may name and this program has no option for
FOREIGN = """
pretrained_transformer_subfolder trust_remote_code logging_dir cache_dir_text cache_dir_vae
seed_for_each_device prediction_type delete_model_after_load i_know_what_i_am_doing
text_encoder_4_precision quantization_config quantize_activations sdnq_weights_dtype
gradient_precision keep_vae_loaded vae_cache_ondemand vae_cache_disable vae_cache_preprocess
gradient_checkpointing_segment_stride
gradient_checkpointing_offload_attention
gradient_checkpointing_offload_pin_memory_max_buckets offload_during_save enable_group_offload
group_offload_type group_offload_blocks_per_group ramtorch ramtorch_target_modules
musubi_block_swap_device attention_mechanism sageattention_usage accelerator_cache_clear_interval
set_grads_to_none dynamo_fullgraph peft_lora_mode singlora_ramp_up_steps slider_lora_target
init_lora_ema init_lora_step init_lokr_norm assistant_lora_path
disable_assistant_lora validation_lycoris_strength flow_cubic_schedule_weights
flux_guidance_value flux_guidance_min flux_guidance_max flux_attention_masked_training
input_perturbation_steps noise_offset offset_noise timestep_bias_strategy snr_gamma use_soft_min_snr
snr_weight soft_min_snr_sigma_data masked_loss_probability slider_strength prodigy_steps
lr_num_cycles strict_epoch_limit ignore_final_epochs
optimizer_offload_gradients text_encoder_lr train_text_encoder
ema_cpu_only ema_warmup_steps ema_foreach_disable checkpointing_rolling_steps
checkpoints_rolling_total_limit checkpointing_use_tempdir delete_invalid_checkpoints
disk_low_threshold
disk_low_action disk_low_script post_checkpoint_script validation_epoch_interval validate_after_step
validate_after_epoch validation_on_startup validation_disable_unconditional
validation_guidance_rescale validation_seed_source validation_randomize validation_noise_scheduler
validation_guidance_skip_layers validation_method
validation_external_script validation_external_background validation_adapter_path
validation_adapter_strength validation_multigpu validation_image_format validation_image_quality
validation_stitch_input_location eval_timesteps
eval_dataset_pooling
push_to_hub_background publishing_config post_upload_script custom_tracker tracker_image_layout
webhook_reporting_interval aspect_bucket_rounding aspect_bucket_alignment max_upscale_threshold
metadata_update_interval write_batch_size read_batch_size image_processing_batch_size max_workers
aspect_bucket_worker_count enable_multiprocessing dataloader_prefetch dataloader_prefetch_qlen
compress_disk_cache text_cache_ondemand text_cache_disable text_embed_full_cache
allow_dataset_oversubscription disable_bucket_pruning override_dataset_config skip_file_discovery
preserve_data_backend_cache vae_cache_scan_behaviour delete_unwanted_images
delete_problematic_images
delete_nsfw_images ignore_missing_files print_filenames print_sampler_statistics
debug_aspect_buckets
debug_dataset_loader scheduled_sampling_sampler scheduled_sampling_order
scheduled_sampling_reflexflow scheduled_sampling_reflexflow_alpha
same_network accelerate_extra_args find_unused_parameters offload_param_path fsdp_state_dict_type
fsdp_auto_wrap_policy fsdp_cpu_offload fsdp_activation_checkpointing
context_parallel_size context_parallel_comm_strategy instance_data_dir
repeats
crop
"""


@pytest.mark.parametrize("name", FOREIGN.split())
def test_foreign_options_are_refused_by_name(name: str) -> None:
    assert unsupported_reason(name)
    assert name not in all_options()
    assert name not in option_aliases()


def test_refused_names_are_no_options() -> None:
    for name in [*all_options(), *option_aliases()]:
        assert unsupported_reason(name) is None, name
    names = [name for _, names in unsupported_names_by_reason() for name in names]
    assert len(set(names)) == len(names)


def test_declarations() -> None:
    assert len(all_options()) >= 120
    for option in all_options().values():
        assert option.text.endswith("."), option.name
        assert option.level in ("basic", "common", "advanced")
        assert not option.nullable or option.default is None, option.name
        assert set(option.value_aliases.values()) <= set(option.choices), option.name
        assert not set(option.refused_values) & set(option.choices) or option.kind == "flag", (
            option.name
        )
        assert not set(option.aliases) & set(all_options()), option.name
        if option.kind in ("integer", "number"):
            assert option.bounds, option.name
    assert 15 <= sum(option.level == "basic" for option in all_options().values()) <= 30


def test_beginners_defaults() -> None:
    expected = {
        "model_type": "lora", "lora_rank": 16, "lora_alpha": None, "lora_dropout": 0.0, "learning_rate": 1e-4,
        "train_batch_size": 1, "grad_clip_method": "norm", "max_grad_norm": 1.0, "flow_schedule_shift": None,
        "validation_guidance_real": 1.0,
        "resume_from_checkpoint": "latest", "chroma_sigma_density": "quadratic",
    }  # fmt: skip
    assert {name: all_options()[name].default for name in expected} == expected


@pytest.fixture
def judge(tmp_path: Path) -> Any:
    (tmp_path / "multidatabackend.json").write_text("[]")

    def judged(**config: Any) -> tuple[list[str], list[str]]:
        (tmp_path / "config.json").write_text(json.dumps({"max_train_steps": 9, **config}))
        tried = try_load_config(environ={}, cwd=tmp_path)
        return [problem.message for problem in tried.problems], list(
            tried.loaded.notices
        ) if tried.loaded else []

    return judged


@pytest.mark.parametrize(
    ("config", "option"),
    [
        ({"num_train_epochs": 1}, "max_train_steps"),
        ({"mixed_precision": "no", "base_model_default_dtype": "bf16"}, "base_model_default_dtype"),
        ({"model_type": "full", "base_model_precision": "nf4-bnb"}, "base_model_precision"),
        ({"model_type": "full", "musubi_blocks_to_swap": 4}, "musubi_blocks_to_swap"),
        ({"musubi_blocks_to_swap": 1.5}, "musubi_blocks_to_swap"),
        ({"musubi_blocks_to_swap": 0.5, "gradient_checkpointing": False}, "musubi_blocks_to_swap"),
        ({"musubi_blocks_to_swap": 21, "gradient_checkpointing": 20}, "musubi_blocks_to_swap"),
        ({"musubi_blocks_to_swap": 4, "device": "mps"}, "musubi_blocks_to_swap"),
        (
            {"gradient_checkpointing_backend": "unsloth", "device": "cpu"},
            "gradient_checkpointing_backend",
        ),
        ({"lr_scale": True, "lr_scale_sqrt": True}, "lr_scale_sqrt"),
        ({"lr_scheduler": "cosine", "lr_end": 1e-3}, "lr_end"),
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "linear"}, "lr_scheduler"),
        ({"optimizer_config": "a=1,b"}, "optimizer_config"),
        ({"optimizer_config": "amsgrad=perhaps"}, "optimizer_config"),
        ({"optimizer": "lion", "optimizer_config": "amsgrad=true"}, "optimizer_config"),
        ({"resolution": 1024, "resolution_type": "area"}, "resolution"),
        ({"resolution": 1}, "resolution"),
        ({"minimum_aspect_ratio": 5}, "minimum_aspect_ratio"),
        ({"maximum_image_size": 2048}, "maximum_image_size"),
        ({"target_downsample_size": 2048}, "target_downsample_size"),
        ({"maximum_image_size": 512, "target_downsample_size": 600}, "target_downsample_size"),
        ({"prepend_instance_prompt": True, "only_instance_prompt": True}, "only_instance_prompt"),
        (
            {"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True},
            "flow_use_uniform_schedule",
        ),
        (
            {"flow_use_uniform_schedule": True, "chroma_sigma_density": "parabola"},
            "flow_use_uniform_schedule",
        ),
        ({"flux_fast_schedule": True, "flow_custom_timesteps": "500"}, "flow_custom_timesteps"),
        ({"flow_schedule_shift": 3, "flow_schedule_auto_shift": True}, "flow_schedule_auto_shift"),
        ({"flow_custom_timesteps": "500,x"}, "flow_custom_timesteps"),
        ({"flow_custom_timesteps": ","}, "flow_custom_timesteps"),
        ({"flow_custom_timesteps": "1500"}, "flow_custom_timesteps"),
        ({"flow_custom_timesteps": "-0.5"}, "flow_custom_timesteps"),
        ({"flow_custom_timesteps": "nan"}, "flow_custom_timesteps"),
        ({"validation_resolution": "512x"}, "validation_resolution"),
        ({"validation_resolution": "1.0"}, "validation_resolution"),
        ({"report_to": "wandb,swanlab"}, "report_to"),
        ({"webhook_config": "https://x/y"}, "webhook_config"),
        ({"evaluation_type": "fid"}, "evaluation_type"),
        (
            {
                "evaluation_type": "shapes",
                "model_flavour": "nano",
                "pretrained_evaluation_model_name_or_path": "who/what",
            },
            "pretrained_evaluation_model_name_or_path",
        ),
        ({"evaluation_type": "shapes", "model_flavour": "hd"}, "evaluation_type"),
        (
            {"evaluation_type": "zorbo", "pretrained_model_name_or_path": "who/what"},
            "evaluation_type",
        ),
        ({"evaluation_type": "shapes,none", "model_flavour": "nano"}, "evaluation_type"),
        ({"evaluation_prompts": 0}, "evaluation_prompts"),
        ({"validation_strengths": "0.5,x"}, "validation_strengths"),
        ({"validation_strengths": -1}, "validation_strengths"),
        ({"alpha_background": "red"}, "alpha_background"),
        ({"output_dir": ""}, "output_dir"),
        ({"flux_guidance_mode": "random-range"}, "flux_guidance_mode"),
        ({"flux_lora_target": "all+ffs+embedder"}, "flux_lora_target"),
        ({"device": 3}, "device"),
        ({"lora_rank": 2.5}, "lora_rank"),
        ({"learning_rate": [1]}, "learning_rate"),
        ({"instance_prompt": {}}, "instance_prompt"),
        ({"num_processes": 0}, "num_processes"),
        ({"num_processes": "all"}, "num_processes"),
        ({"num_processes": 2, "max_restarts": -1}, "max_restarts"),
        ({"num_machines": 2, "num_processes": 4}, "main_process_ip"),
        ({"num_machines": 2, "num_processes": 3, "main_process_ip": "a"}, "num_processes"),
        (
            {"num_machines": 2, "num_processes": 4, "main_process_ip": "a", "machine_rank": 2},
            "machine_rank",
        ),
        ({"num_machines": 2, "main_process_ip": "a b", "num_processes": 2}, "main_process_ip"),
        ({"main_process_port": 65536}, "main_process_port"),
        ({"fsdp_version": 1}, "fsdp_version"),
        ({"fsdp_enable": True, "deepspeed_config": {"train_batch_size": 1}}, "fsdp_enable"),
        (
            {"fsdp_enable": True, "musubi_blocks_to_swap": 2, "num_processes": 2},
            "fsdp_enable",
        ),
        ({"fsdp_cpu_offload": True}, "fsdp_cpu_offload"),
        ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy"),
        (
            {
                "num_processes": 2,
                "optimizer_release_gradients": True,
                "max_grad_norm": 0,
            },
            "optimizer_release_gradients",
        ),
        ({"accelerate_visible_devices": [0, 0]}, "accelerate_visible_devices"),
        ({"accelerate_visible_devices": []}, "accelerate_visible_devices"),
        ({"accelerate_visible_devices": "0,x"}, "accelerate_visible_devices"),
        ({"accelerate_config": "nowhere.yaml"}, "accelerate_config"),
        (
            {"scheduled_sampling_probability": 0.5, "scheduled_sampling_max_step_offset": 0},
            "scheduled_sampling_max_step_offset",
        ),
        (
            {
                "scheduled_sampling_probability": 0.5,
                "scheduled_sampling_ramp_steps": 100,
                "scheduled_sampling_prob_start": 0.6,
            },
            "scheduled_sampling_prob_start",
        ),
        (
            {"scheduled_sampling_probability": 0.5, "mixflow_enabled": True},
            "scheduled_sampling_probability",
        ),
        ({"mixflow_enabled": True, "input_perturbation": 0.1}, "mixflow_enabled"),
        ({"mixflow_enabled": True, "mixflow_gamma": 0}, "mixflow_gamma"),
        (
            {"scheduled_sampling_probability": 0.5, "scheduled_sampling_sampler": "dpm"},
            "scheduled_sampling_sampler",
        ),
        (
            {"scheduled_sampling_probability": 0.5, "scheduled_sampling_reflexflow": True},
            "scheduled_sampling_reflexflow",
        ),
    ],
)
def test_contradictions(judge: Any, config: dict[str, Any], option: str) -> None:
    problems, _ = judge(**config)
    assert len(problems) == 1, problems
    assert problems[0].startswith((f"{option}:", f"{option} = "))


@pytest.mark.parametrize(
    "config",
    [
        {"flow_use_uniform_schedule": True, "chroma_sigma_density": "uniform"},
        {"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 3},
        {"text_encoder_1_precision": "int8", "quantize_via": "cpu"},
        {"lr_power": 2, "lr_scheduler": "polynomial"},
        {"lr_power": 1.0, "lr_scheduler": "cosine"},
        {"validation_resolution": "512, 768x1024"},
        {"report_to": "wandb,tensorboard"},
        {"optimizer": "lion", "optimizer_config": "beta1=0.8, kahan_sum=true"},
        {"resolution": 1.0, "resolution_type": "area"},
        {"evaluation_type": "clip,likeness,diversity"},
        {"evaluation_type": "likeness", "pretrained_evaluation_model_name_or_path": "who/what"},
        {"validation_prompt_library": True},
        {"eval_loss_disable": True, "eval_epoch_interval": 0.5},
        {"evaluation_type": "zorbo, shapes", "model_flavour": "nano", "evaluation_prompts": 8},
        {"evaluation_type": "shapes", "pretrained_model_name_or_path": "."},
        {"num_processes": 2},
        {"num_processes": "auto", "accelerate_visible_devices": [1, 3]},
        {"num_machines": 2, "num_processes": 4, "main_process_ip": "10.0.0.1", "machine_rank": 1},
        {"fsdp_enable": True, "fsdp_version": 2, "fsdp_reshard_after_forward": False},
        {"scheduled_sampling_probability": 0.5},
        {
            "scheduled_sampling_probability": 1,
            "scheduled_sampling_ramp_steps": 1000,
            "scheduled_sampling_prob_start": 0.1,
            "scheduled_sampling_prob_end": 0.5,
            "scheduled_sampling_ramp_shape": "cosine",
            "scheduled_sampling_strategy": "biased_late",
        },
        {"mixflow_enabled": True, "mixflow_gamma": 0.4},
        {"validation_strengths": 0.5},
        {"validation_strengths": "none"},
        {"validation_strengths": "0.25, 0.5"},
    ],
)
def test_what_agrees_is_let_through(judge: Any, config: dict[str, Any]) -> None:
    assert judge(**config) == ([], [])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"mixed_precision": "fp16"}, "overflows"),
        ({"vae_dtype": "fp16"}, "overflows"),
        ({"flux_fast_schedule": True}, "leave it off"),
        ({"chroma_sigma_density": "quadratic-literal"}, "[0.25, 0.75)"),
        ({"flow_schedule_shift": 3}, "Chroma needs none"),
        ({"optimizer": "prodigy"}, "1.0 is usual"),
        (
            {"lr_warmup_steps": 9},
            "lr_warmup_steps (9) >= max_train_steps (9): the learning rate never reaches its target",
        ),
        (
            {"model_type": "full", "optimizer": "muon", "lora_rank": 4, "use_dora": True},
            "lora_rank, use_dora have no effect with model_type full",
        ),
        ({"evaluation_prompts": 8}, "no effect with evaluation_type none"),
        ({"text_encoder_1_precision": "fp8"}, "three times that of int8"),
        (
            {"quantize_via": "cpu"},
            "it needs base_model_precision int8, int4, nf4 or fp8, or text_encoder_1_precision int8",
        ),
        (
            {"huber_c": 0.2},
            "huber_c has no effect with loss_type l2: it needs loss_type huber or smooth_l1",
        ),
        (
            {"lr_power": 2, "lr_scheduler": "cosine"},
            "lr_power has no effect with lr_scheduler cosine",
        ),
        (
            {"lr_power": 2, "lr_scheduler": "linear"},
            "lr_power has no effect with lr_scheduler linear",
        ),
        (
            {"scheduled_sampling_probability": 0.5, "scheduled_sampling_max_step_offset": 10},
            "shorter than a step of any usual sampler",
        ),
        (
            {
                "scheduled_sampling_max_step_offset": 40,
                "scheduled_sampling_strategy": "biased_late",
            },
            "have no effect with scheduled_sampling_probability 0.0",
        ),
        (
            {"scheduled_sampling_probability": 0.5, "scheduled_sampling_prob_end": 0.8},
            "scheduled_sampling_prob_end has no effect with scheduled_sampling_ramp_steps 0",
        ),
        (
            {"scheduled_sampling_probability": 0.5, "scheduled_sampling_sampler": "euler"},
            "because they are off or change nothing: scheduled_sampling_sampler",
        ),
        ({"optimizer": "lion", "adam_beta1": 0.8}, "adam_beta1 has no effect with optimizer lion"),
        ({"max_restarts": 1}, "max_restarts has no effect with num_processes 1"),
        (
            {"fsdp_reshard_after_forward": False},
            "fsdp_reshard_after_forward has no effect with fsdp_enable false",
        ),
        ({"find_unused_parameters": True}, "find_unused_parameters"),
        (
            {"ramtorch": False, "post_upload_script": None},
            "because they are off or change nothing: post_upload_script, ramtorch",
        ),
    ],
)
def test_remarks(judge: Any, config: dict[str, Any], words: str) -> None:
    problems, notes = judge(**config)
    assert problems == []
    assert len(notes) == 1, notes
    assert words in notes[0]


def test_a_configuration_saved_by_a_form_needs_no_change(judge: Any) -> None:
    """Hundreds of keys at the values that SimpleTuner's forms save, of this model and of others."""
    problems, notes = judge(
        **json.loads((Path(__file__).parent / "saved_by_a_form.json").read_text())
    )
    assert problems == []
    assert any("validation_guidance is read as validation_guidance_real" in note for note in notes)
    assert any("sdxl-vae-fp16-fix is the VAE of another model" in note for note in notes)


def test_every_precision_of_others_is_read_or_refused_with_the_alternative(judge: Any) -> None:
    """The 28 values of SimpleTuner's base_model_precision, and those its texts name besides."""
    names = [
        "no_change",
        "int8-quanto",
        "int4-quanto",
        "int2-quanto",
        "fp8-quanto",
        "fp8uz-quanto",
        "int8-torchao",
        "int8dq-torchao",
        "int8dq-int4-torchao",
        "int4-torchao",
        "fp8-torchao",
        "fp8wo-torchao",
        "fp8-int4-torchao",
        "int8-sdnq",
        "uint8-sdnq",
        "int16-sdnq",
        "uint16-sdnq",
        "fp16-sdnq",
        "fp8-sdnq",
        "int6-sdnq",
        "int5-sdnq",
        "uint5-sdnq",
        "uint4-sdnq",
        "uint3-sdnq",
        "uint2-sdnq",
        "nf4-bnb",
        "fp8-native",
        "fp8-transformerengine",
        "nf4-torchao",
        "int8-bnb",
        "fp4-bnb",
        "none",
        "bf16",
    ]
    own = all_options()["base_model_precision"].choices
    for name in names:
        for option in ("base_model_precision", "text_encoder_1_precision"):
            problems, notes = judge(**{option: name})
            if name == "no_change":
                assert (problems, notes) == ([], [])
            elif problems:
                assert len(problems) == 1
                assert problems[0].endswith(f"; allowed: {', '.join(own)}")
                assert name in ("int2-quanto", "uint2-sdnq", "uint3-sdnq")
                assert "nf4 is the smallest" in problems[0]
            else:
                meant = notes[0].rpartition(" ")[2]
                assert f"{option} {name} is read as {meant}" in notes[0]
                assert meant == {
                    **dict.fromkeys(("none", "bf16"), "no_change"),
                    **dict.fromkeys(("int16-sdnq", "uint16-sdnq", "fp16-sdnq"), "no_change"),
                    **dict.fromkeys(("int6-sdnq", "int5-sdnq", "uint5-sdnq"), "int8"),
                    **{"uint8-sdnq": "int8", "uint4-sdnq": "int4"},
                    **{"fp8-int4-torchao": "int4", "int8dq-int4-torchao": "int4", "fp4-bnb": "nf4"},
                }.get(name, meant)
                assert name.startswith((meant, "u", "fp", "int", "none", "bf16"))


def test_harmless_values_are_few(judge: Any) -> None:
    assert is_harmless_value("context_parallel_size", 1)
    assert is_harmless_value("fsdp_state_dict_type", "SHARDED_STATE_DICT")
    assert is_harmless_value("snr_weight", 1.0)
    for name, value in {
        "context_parallel_size": 2,
        "fsdp_cpu_offload": True,
        "accelerate_extra_args": "--multi_gpu",
    }.items():
        assert not is_harmless_value(name, value)
    _, notes = judge(
        disable_bucket_pruning=True, ltx_i2v_prob=0.3, validation_disable_unconditional="true"
    )
    assert notes == [
        "skipped, because they are off or change nothing: "
        "disable_bucket_pruning, ltx_i2v_prob, validation_disable_unconditional"
    ]


def test_documents_are_in_step_with_the_schema(tmp_path: Path) -> None:
    docs.write_option_docs(tmp_path)
    for name in ("options.md", "options.schema.json"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), (
            f"docs/{name} is stale: run `python -m simpletuner.config.docs`"
        )
    page, properties = docs.render_options_page(), docs.build_json_schema()["properties"]
    assert "`attention_mechanism` N" in page
    assert "`sla_config`," in page
    for name in all_options():
        assert f"`{name}`" in page
        assert name in properties
