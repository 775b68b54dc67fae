"""A file of accelerate is read as options: what it may say, what wins, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.load import ConfigLoadResult, try_load_config

# As `accelerate config` writes it for four GPUs on one machine.
FOUR_GPUS = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_GPU
downcast_bf16: 'no'
enable_cpu_affinity: false
gpu_ids: 0,2,4,6
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 4
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_processes: 2
fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_version: 2
"""
DEEPSPEED = """\
distributed_type: DEEPSPEED
num_processes: 2
deepspeed_config:
  gradient_accumulation_steps: 1
  gradient_clipping: 1.0
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 2
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    (tmp_path / "multidatabackend.json").write_text("[]")
    (tmp_path / "config.json").write_text('{"max_train_steps": 9, "accelerate_config": "a.yaml"}')

    def loaded(text: str, **flags: str) -> ConfigLoadResult:
        (tmp_path / "a.yaml").write_text(text)
        return try_load_config(list(flags.items()), environ={}, cwd=tmp_path)

    return loaded


def test_the_numbers_of_a_plain_file(load: Any) -> None:
    tried = load(FOUR_GPUS)
    assert tried.problems == ()
    options = tried.loaded.config.distributed
    assert options.num_processes == 4
    assert options.accelerate_visible_devices == "0,2,4,6"
    assert not options.fsdp_enable
    assert options.deepspeed_config is None
    assert tried.loaded.origins["num_processes"] == "a.yaml:11:1"


def test_an_option_beside_it_wins_and_a_notice_says_so(load: Any) -> None:
    tried = load(FOUR_GPUS, num_processes="2")
    assert tried.loaded.config.distributed.num_processes == 2
    assert "--num_processes: num_processes replaces a.yaml:11:1" in tried.loaded.notices
    same = load(FOUR_GPUS, num_processes="4")
    assert not any("replaces" in notice for notice in same.loaded.notices)


def test_fsdp(load: Any) -> None:
    tried = load(FSDP)
    assert tried.problems == ()
    options = tried.loaded.config.distributed
    assert options.fsdp_enable
    assert not options.fsdp_reshard_after_forward
    assert options.num_processes == 2


@pytest.mark.parametrize(("strategy", "reshard"), [("FULL_SHARD", True), ("SHARD_GRAD_OP", False)])
def test_strategies_of_fsdp1(load: Any, strategy: str, reshard: bool) -> None:
    text = f"distributed_type: FSDP\nfsdp_config:\n  fsdp_sharding_strategy: {strategy}\n"
    assert load(text).loaded.config.distributed.fsdp_reshard_after_forward is reshard


def test_deepspeed(load: Any, tmp_path: Path) -> None:
    given = load(DEEPSPEED).loaded.config.distributed.deepspeed_config
    assert given["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert given["gradient_clipping"] == 1.0
    (tmp_path / "ds.json").write_text("{}")
    named = "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: ds.json\n"
    assert load(named).problems == ()


def test_contradictions_name_both(load: Any) -> None:
    problem = load(DEEPSPEED, fsdp_enable="true").problems[0]
    assert problem.location == "--fsdp_enable"
    assert "deepspeed_config is given too" in problem.message


@pytest.mark.parametrize(
    ("text", "location", "words"),
    [
        ("distributed_type: MEGATRON_LM\n", "a.yaml:1:1", "MEGATRON_LM: is not supported; allowed"),
        ("distributed_type: 'NO'\nnum_processes: 2\n", "a.yaml:2:1", "is one process"),
        ("num_processes: 2\nnum_proceses: 3\n", "a.yaml:2:1", "is not a key of accelerate"),
        ("compute_environment: AMAZON_SAGEMAKER\n", "a.yaml:1:1", "allowed: LOCAL_MACHINE"),
        ("num_processes: many\n", "a.yaml:1:1", "must be integer | auto"),
        ("- 1\n", "a.yaml", "must hold the settings"),
        ("a: [\n", "a.yaml:2:1", "is not YAML"),
        ("a: 2026-13-41\n", "a.yaml", "is not YAML"),
        (
            "distributed_type: FSDP\nfsdp_config:\n  fsdp_sharding_strategy: HYBRID_SHARD\n",
            "a.yaml:3:3",
            "HYBRID_SHARD: is not supported",
        ),
        ("distributed_type: FSDP\nfsdp_config: 3\n", "a.yaml:2:1", "must be an object"),
        (
            "distributed_type: FSDP\nfsdp_config:\n  fsdp_offload_params: true\n",
            "a.yaml:3:3",
            "fsdp_cpu_offload: use base_model_precision",
        ),
    ],
)
def test_what_is_refused(load: Any, text: str, location: str, words: str) -> None:
    problems = load(text).problems
    assert len(problems) == 1, problems
    assert problems[0].location == location
    assert words in problems[0].message


def test_a_bare_no_is_one_process(load: Any) -> None:
    assert load("distributed_type: NO\nnum_processes: 1\n").problems == ()
