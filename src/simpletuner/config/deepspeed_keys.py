"""The keys of DeepSpeed's configuration: which are passed on, compared or refused, and why.

Names and meanings as in DeepSpeed 0.19.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of value. described: for messages."""

    accepts: Callable[[Any], bool]
    described: str


def _is_count(value: Any) -> bool:
    # Files write 5e8 for 500 million, which JSON reads as a float.
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value >= 0
        and value == int(value)
    )


COUNT = Kind(_is_count, "a whole number from 0")
FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
TEXT = Kind(lambda value: isinstance(value, str), "a text")
SECTION = Kind(lambda value: isinstance(value, dict), "an object, {...}")
GRAD_ACCUM_DTYPE = "grad_accum_dtype"
SUM_DTYPES = ("fp32", "bf16")
DATA_TYPES = Kind(
    lambda value: (
        isinstance(value, dict)
        and value.keys() <= {GRAD_ACCUM_DTYPE}
        and value.get(GRAD_ACCUM_DTYPE) in (*SUM_DTYPES, None)
    ),
    f'{{"{GRAD_ACCUM_DTYPE}": "fp32"}} or {{"{GRAD_ACCUM_DTYPE}": "bf16"}}',
)


def _one_of(*values: Any) -> Kind:
    listed = ", ".join(map(str, values))
    return Kind(lambda value: value in values and not isinstance(value, bool), f"one of {listed}")


# Sections that hold values to compare.
SECTION_KEYS = (
    "zero_optimization",
    "bf16",
    "optimizer",
    "scheduler",
    "activation_checkpointing",
)
COMPARED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
PASSED_KEYS: Mapping[str, Kind] = {
    "aio": SECTION,
    "comms_logger": SECTION,
    "communication_data_type": _one_of(*SUM_DTYPES),
    "data_types": DATA_TYPES,
    "disable_allgather": FLAG,
    "dump_state": FLAG,
    "log_level": TEXT,
    "memory_breakdown": FLAG,
    "steps_per_print": COUNT,
    "wall_clock_breakdown": FLAG,
    "zero_allow_untested_optimizer": FLAG,
}
_LOOP = "the training loop and the order of its samples stay as they are without DeepSpeed"
_EVENTS = "use report_to"
_KERNELS = "it needs compiled kernels, and rounds differently"
# Refused unless they are off.
REFUSED_KEYS: Mapping[str, str] = {
    "amp": "mixed_precision sets the precision",
    "autotuning": "simpletuner plan finds what fits",
    "checkpoint": "checkpoints have the format of this program",
    "compile": "use dynamo_backend",
    "compression_training": _LOOP,
    "csv_monitor": _EVENTS,
    "comet": _EVENTS,
    "curriculum_learning": _LOOP,
    "data_efficiency": _LOOP,
    "data_sampling": _LOOP,
    "dataloader_drop_last": _LOOP,
    "eigenvalue": _LOOP,
    "elasticity": "any number of processes resumes a checkpoint anyway",
    "expert_parallel": "the network has no experts",
    "flops_profiler": "simpletuner plan counts the work of a step",
    "fp16": "training needs bf16 or fp32; fp16 rounds small gradients to zero",
    "gradient_allreduce_op": "the gradient of a step is always the sum over its samples",
    "gradient_predivide_factor": "the gradient of a step is always the sum over its samples",
    "hybrid_engine": _LOOP,
    "load_universal_checkpoint": "checkpoints have the format of this program",
    "managed_gradient_accumulation": "the training loop decides when a step ends",
    "mesh_param": "every process holds a shard of the same kind",
    "nebula": "checkpoints have the format of this program",
    "pipeline": "every process computes the whole network",
    "prescale_gradients": "the gradient of a step is always the sum over its samples",
    "progressive_layer_drop": _LOOP,
    "sequence_parallel_size": "a sample is computed by one process",
    "sparse_attention": _KERNELS,
    "sparse_gradients": "the network has no sparse gradients",
    "tensor_parallel": "every process computes the whole network",
    "tensorboard": _EVENTS,
    "torch_autocast": "mixed_precision and base_model_default_dtype set the precision",
    "wandb": _EVENTS,
    "weight_quantization": "use base_model_precision",
    "zero_force_ds_cpu_optimizer": (
        "offloaded states are updated by torch's fused CPU optimizer, which needs no compiler"
    ),
}
_BF16_STATES = "steps of a small learning rate would be rounded away"
# Key -> the value that asks for what happens anyway, and why no other is taken.
REFUSED_BF16_KEYS: Mapping[str, tuple[bool, str]] = {
    "bf16_master_weights_and_grads": (False, _BF16_STATES),
    "bf16_optimizer_states": (False, _BF16_STATES),
    "check_grad_overflow": (True, "a gradient that is not finite would spoil the weights"),
    "immediate_grad_update": (True, "gradients are summed as soon as they exist"),
}

OFFLOAD_KEYS = ("offload_optimizer", "offload_param")  # the second one only with stage 3
OFFLOAD_VALUES: Mapping[str, Kind] = {
    "device": _one_of("none", "cpu", "nvme"),
    "nvme_path": TEXT,
    "pin_memory": FLAG,
    "buffer_count": COUNT,
    "buffer_size": COUNT,
    "max_in_cpu": COUNT,
    "fast_init": FLAG,
    "pipeline_read": FLAG,
    "pipeline_write": FLAG,
    "ratio": Kind(lambda value: value == 1, "1: all of the optimizer states are offloaded"),
    "super_offload": Kind(lambda value: value is False, "false: it needs compiled kernels"),
}
_SIZES_3 = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "module_granularity_threshold",
)
_FLAGS = (
    "contiguous_gradients",
    "reduce_scatter",
    "overlap_comm",
    "allgather_partitions",
    "use_multi_rank_bucket_allreduce",
    "round_robin_gradients",
    "parameter_alignment",
    "ignore_unused_parameters",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "override_module_apply",
    "use_all_reduce_for_fetch_params",
    "stage3_use_all_reduce_for_fetch_params",
    "allgather_sequential",
    "stage3_allgather_sequential",
)
ZERO_KEYS: Mapping[str, Kind] = {
    "stage": _one_of(0, 1, 2, 3),
    **dict.fromkeys(OFFLOAD_KEYS, SECTION),
    **dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "sub_group_size"), COUNT),
    **dict.fromkeys((*_SIZES_3, *(f"stage3_{name}" for name in _SIZES_3)), COUNT),
    **dict.fromkeys(_FLAGS, FLAG),
}
_GATHER = "whole weights are always gathered for a checkpoint and the exported model"
# Key -> values that ask for what happens anyway, and why no other is taken.
REFUSED_ZERO_KEYS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "gather_16bit_weights_on_model_save": ((True, False), _GATHER),
    "stage3_gather_16bit_weights_on_model_save": ((True, False), _GATHER),
    "stage3_gather_fp16_weights_on_model_save": ((True, False), _GATHER),
    "compute_grad_norm": ((True,), "the norm is logged, and decides whether a step is skipped"),
    "cpu_offload": ((False,), 'write "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param": ((False,), 'write "offload_param": {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": ((False,), "write pin_memory in offload_optimizer"),
    "elastic_checkpoint": ((False,), "any number of processes resumes a checkpoint anyway"),
    "legacy_stage1": ((False,), "DeepSpeed does not support it"),
    "load_from_fp32_weights": ((True,), "float32 master weights are always restored"),
    "memory_efficient_linear": (
        (False,),
        "it replaces torch's linear layer in the whole process, and rounds differently",
    ),
    "mics_shard_size": ((-1, 0), "the weights are sharded over all processes"),
    "mics_hierarchical_params_gather": ((False,), "the weights are sharded over all processes"),
    "pipeline_loading_checkpoint": ((False,), "checkpoints have the format of this program"),
    "save_muon_momentum_buffer_in_memory": ((False,), "muon needs whole matrices"),
    "zero_hpz_partition_size": ((0, 1), "the weights are sharded over all processes"),
    "zero_quantized_weights": ((False,), _KERNELS),
    "zero_quantized_nontrainable_weights": ((False,), "use base_model_precision"),
    "zero_quantized_gradients": ((False,), _KERNELS),
    "zenflow": ((), _LOOP),
}
# By the type in lower case. By default, DeepSpeed's Adam decouples the weight decay.
OPTIMIZER_TYPES: Mapping[str, str] = {"adamw": "adamw", "adam": "adamw", "lion": "lion"}
SCHEDULER_TYPES: Mapping[str, str] = {
    "WarmupLR": "constant",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
UNSUITABLE_OPTIMIZERS: Mapping[str, str] = {
    "adamw_bf16": "rounds bf16 weights, where ZeRO holds float32 master weights",
    "adamw_8bit": "holds states in blocks of a whole weight",
    "adafactor": "needs the rows and columns of each matrix",
    "prodigy": "estimates one rate from all weights together",
    "adamw_schedulefree": "exchanges the weights of the network for their average",
    "muon": "needs whole matrices",
}
