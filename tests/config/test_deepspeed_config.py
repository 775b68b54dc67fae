"""DeepSpeed's file: what is read, what contradicts our options, what is refused and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config import deepspeed_keys
from simpletuner.config.deepspeed_config import (
    ELEMENTWISE_OPTIMIZERS,
    FLOAT32_SUMS,
    find_batch_size_error,
    find_deepspeed_errors,
    find_deepspeed_notices,
    parse_zero_config,
    uses_deepspeed,
)
from simpletuner.config.launch_environment import LaunchedProcess, check_agreement
from simpletuner.config.load import config_from_resolved, resolved_options, try_load_mapping
from simpletuner.config.schema import RunConfig
from simpletuner.config.sections_training import OptimizerOptions
from simpletuner.errors import ConfigError

ZERO_2 = {"zero_optimization": {"stage": 2}}
# As SimpleTuner's and Hugging Face's guides write it.
SIMPLETUNER = {
    "zero_optimization": {
        "stage": 2,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-4, "warmup_num_steps": 500},
    },
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
}
HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps"), "auto")},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def run_with(config: Any, **options: Any) -> RunConfig:
    return config_from_resolved(
        {**resolved_options(RunConfig()), "deepspeed_config": config, **options}
    )


def errors(config: Any, **options: Any) -> list[str]:
    return list(find_deepspeed_errors(run_with(config, **options)))


def zero(**section: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **section}}


def test_the_published_examples_are_read() -> None:
    same = {"train_batch_size": 2, "gradient_accumulation_steps": 4, "lr_warmup_steps": 500}
    assert errors(SIMPLETUNER, **same) == []
    config = parse_zero_config(run_with(SIMPLETUNER, **same))
    assert (config.stage, config.other) == (2, {})
    assert config.section == {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    notices = list(find_deepspeed_notices(run_with(SIMPLETUNER, **same)))
    assert len(notices) == 2
    assert "offload_param has no effect with stage 2" in notices[0]

    assert errors(HUGGING_FACE) == []
    config = parse_zero_config(run_with(HUGGING_FACE))
    assert config.section == {
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "stage3_max_live_parameters": 1e9,
    }
    assert config.other == {"steps_per_print": 2000, "wall_clock_breakdown": False}


def test_each_contradiction_is_told_with_both_values() -> None:
    found = errors(SIMPLETUNER, learning_rate=2e-4, adam_beta2=0.95, max_grad_norm=0.5)
    assert found == [
        "train_micro_batch_size_per_gpu = 2, but train_batch_size is 1; make them agree, or write "
        '"auto" for train_micro_batch_size_per_gpu',
        "gradient_accumulation_steps = 4, but gradient_accumulation_steps is 1; make them agree, or "
        'write "auto" for gradient_accumulation_steps',
        'gradient_clipping = 1.0, but max_grad_norm is 0.5; make them agree, or write "auto" for '
        "gradient_clipping",
        "optimizer.params.lr = 0.0001, but learning_rate is 0.0002; make them agree, or write "
        '"auto" for optimizer.params.lr',
        "optimizer.params.betas = [0.9, 0.999], but adam_beta1, adam_beta2 is [0.9, 0.95]; make "
        'them agree, or write "auto" for optimizer.params.betas',
        "scheduler.params.warmup_max_lr = 0.0001, but learning_rate is 0.0002; make them agree, or "
        'write "auto" for scheduler.params.warmup_max_lr',
        "scheduler.params.warmup_num_steps = 500, but lr_warmup_steps is 0; make them agree, or "
        'write "auto" for scheduler.params.warmup_num_steps',
    ]


@pytest.mark.parametrize(
    ("config", "options", "part"),
    [
        ({"bf16": {"enabled": True}}, {"mixed_precision": "no"}, "bf16.enabled = true, but"),
        ({"bf16": {"enabled": False}}, {}, "mixed_precision bf16 is true"),
        ({"optimizer": {"type": "OneBitAdam"}}, {}, '"OneBitAdam", but optimizer is adamw'),
        ({"optimizer": {"type": "AdamW"}}, {"optimizer": "lion"}, "but optimizer is lion"),
        ({"optimizer": {"params": {"freeze_step": 3}}}, {}, "optimizer.params.freeze_step"),
        ({"scheduler": {"type": "OneCycle"}}, {}, '"OneCycle", but lr_scheduler is constant'),
        (
            {"scheduler": {"params": {"warmup_type": "log"}}},
            {},
            '"log", but the warmup is "linear"',
        ),
        ({"train_batch_size": 3}, {"num_processes": 2}, "train_batch_size = 3, but"),
        ({"train_batch_size": 3}, {"train_batch_size": 2}, "is 2 for each process"),
        ({"fp16": {"enabled": True}}, {}, "fp16: is not supported"),
        ({"gradient_clipping": True}, {}, "gradient_clipping = true, but max_grad_norm is 1.0"),
        ({"wandb": {"enabled": True}}, {}, "wandb: is not supported: use report_to"),
        ({"communication_data_type": "fp16"}, {}, "must be one of fp32, bf16"),
        ({"zero_optimisation": {}}, {}, "did you mean 'zero_optimization'?"),
        ({"optimizer": "AdamW"}, {}, 'optimizer = "AdamW": must be an object'),
        (zero(stage=4), {}, "zero_optimization.stage = 4: must be 1, 2 or 3"),
        (zero(stage=True), {}, "zero_optimization.stage = true: must be 1, 2 or 3"),
        (zero(reduce_bucket_size=-1), {}, "must be a whole number from 0"),
        (zero(overlap_comm=1), {}, "zero_optimization.overlap_comm = 1: must be true or false"),
        (zero(cpu_offload=True), {}, 'write "offload_optimizer": {"device": "cpu"}'),
        (zero(memory_efficient_linear=True), {}, "rounds differently"),
        (zero(zero_quantized_weights=True), {}, "compiled kernels"),
        (zero(offload_optimiser={}), {}, "did you mean 'offload_optimizer'?"),
        (zero(offload_optimizer={"device": "gpu"}), {}, "must be one of none, cpu, nvme"),
        (zero(offload_optimizer={"device": "nvme"}), {}, "needs nvme_path"),
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), {}, "must be 1"),
        (zero(offload_optimizer={"pin": True}), {}, "offload_optimizer.pin: is not a key"),
        ({}, {"grad_clip_method": "value"}, "clips by the norm"),
        ({}, {"optimizer_release_gradients": True}, "optimizer_release_gradients"),
        ({}, {"optimizer_cpu_offload_method": "states"}, "use zero_optimization.offload_optimizer"),
        ({}, {"musubi_blocks_to_swap": 2}, "use stage 3 with zero_optimization.offload_param"),
        ({}, {"device": "mps"}, "needs CUDA or the CPU"),
        (zero(stage=3), {"dynamo_backend": "inductor"}, "dynamo_backend"),
        (zero(stage=3), {"base_model_precision": "fp8"}, "cannot gather fp8 weights"),
        (zero(stage=1, overlap_comm=True), {}, "needs stage 2 or 3"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, {}, 'must be {"grad_accum_dtype": "fp32"}'),
        ({"data_types": {"sum": "fp32"}}, {}, 'must be {"grad_accum_dtype": "fp32"}'),
        ({**zero(stage=1), **FLOAT32_SUMS}, {"model_type": "full"}, "use stage 2"),
        ({"bf16": {"bf16_optimizer_states": True}}, {}, "would be rounded away"),
        ({"bf16": {"check_grad_overflow": False}}, {}, "would spoil the weights"),
        ({"bf16": {"immediate": True}}, {}, "bf16.immediate: is not a key"),
        *(
            ({}, {"optimizer": name}, f"and optimizer {name} {reason}")
            for name, reason in deepspeed_keys.UNSUITABLE_OPTIMIZERS.items()
        ),
    ],
)
def test_each_refusal_has_its_reason(
    config: dict[str, Any], options: dict[str, Any], part: str
) -> None:
    found = errors({**ZERO_2, **config}, **options)
    assert len(found) == 1, found
    assert part in found[0]


def test_every_optimizer_is_trained_or_refused() -> None:
    names = OptimizerOptions.model_json_schema()["properties"]["optimizer"]["enum"]
    assert {*ELEMENTWISE_OPTIMIZERS, *deepspeed_keys.UNSUITABLE_OPTIMIZERS} == set(names)


@pytest.mark.parametrize("value", [False, None, {}, {"enabled": False}, "auto"])
def test_a_refused_feature_may_be_off(value: Any) -> None:
    for key in deepspeed_keys.REFUSED_KEYS:
        assert errors({**ZERO_2, key: value}) == []


def test_stage_0_is_the_replicated_mode() -> None:
    run = run_with(zero(stage=0), optimizer="muon")
    assert not uses_deepspeed(run)
    assert list(find_deepspeed_errors(run)) == []
    assert "DeepSpeed is not started" in next(find_deepspeed_notices(run))
    assert uses_deepspeed(run_with(ZERO_2))
    assert not uses_deepspeed(RunConfig())


def test_the_global_batch_is_compared_when_the_processes_are_known() -> None:
    run = run_with({**ZERO_2, "train_batch_size": 8}, train_batch_size=2)
    assert list(find_deepspeed_errors(run)) == []
    assert list(find_batch_size_error(run, 4)) == []
    (problem,) = find_batch_size_error(run, 2)
    assert "train_batch_size = 8, but" in problem
    assert "2 processes is 4" in problem
    with pytest.raises(ConfigError, match="2 processes is 4"):
        check_agreement(run, LaunchedProcess(1, 2, 1, 2, "127.0.0.1", 1, "torchrun"), {})
    with pytest.raises(ConfigError, match="1 process is 2"):
        check_agreement(run, None, {})


@pytest.mark.parametrize(
    ("stage", "options", "config", "widens"),
    [
        (2, {"model_type": "full"}, {}, True),
        (3, {"model_type": "full"}, {"data_types": {}}, False),
        (3, {"model_type": "full"}, {"data_types": {"grad_accum_dtype": "bf16"}}, False),
        (1, {"model_type": "full"}, {}, False),
        (2, {"model_type": "full", "mixed_precision": "no"}, {}, False),
        (2, {"model_type": "full", "base_model_default_dtype": "fp32"}, FLOAT32_SUMS, False),
        (2, {"model_type": "lora"}, {}, False),
    ],
)
def test_gradients_of_bf16_weights_are_added_in_float32(
    stage: int, options: dict[str, Any], config: dict[str, Any], widens: bool
) -> None:
    """Unless the file says otherwise. Those of an adapter, and of float32 weights, are already."""
    given = {**zero(stage=stage), **config}
    assert errors(given, **options) == []
    parsed = parse_zero_config(run_with(given, **options))
    assert parsed.widens_gradients == widens
    assert parsed.other == ({**FLOAT32_SUMS, **config} if widens or "data_types" in config else {})


def test_a_file_is_read_and_a_broken_one_is_told(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(ZERO_2))
    given = {"deepspeed_config": "deepspeed.json", "model_flavour": "nano"}
    loaded = try_load_mapping(given, tmp_path).loaded
    assert loaded is not None
    assert loaded.config.distributed.deepspeed_config == ZERO_2
    for text, message in (("{", "deepspeed.json:1:2"), ("[1]", "must hold one object")):
        file.write_text(text)
        (problem,) = try_load_mapping(given, tmp_path).problems
        assert message in f"{problem.location} {problem.message}"
    file.unlink()
    (problem,) = try_load_mapping(given, tmp_path).problems
    assert "deepspeed.json" in problem.message
