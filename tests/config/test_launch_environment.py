"""What a launcher says about a process: torchrun's variables, Slurm's, and what contradicts them."""

from __future__ import annotations

from typing import Any

import pytest

from simpletuner.config.launch_environment import (
    SLURM_PORTS,
    LaunchedProcess,
    check_agreement,
    expand_task_counts,
    first_host,
    read_launched_process,
    variables_of_ranks,
)
from simpletuner.config.load import config_from_resolved
from simpletuner.config.schema import DistributedOptions
from simpletuner.errors import ConfigError

DEFAULTS = DistributedOptions()
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu07", "MASTER_PORT": "29123", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "4,3",
}  # fmt: skip


def test_no_launcher() -> None:
    assert read_launched_process({}, DEFAULTS) is None
    # the batch script of a job, and an interactive step of one task
    assert read_launched_process({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, DEFAULTS) is None
    assert read_launched_process({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, DEFAULTS) is None


def test_torchrun() -> None:
    process = read_launched_process(TORCHRUN, DEFAULTS)
    assert process is not None
    assert (process.rank, process.size, process.local_rank, process.local_size) == (5, 8, 1, 4)
    assert (process.address, process.port, process.launcher_has_store) == ("gpu07", 29123, True)
    assert not process.on_one_machine


def test_srun() -> None:
    process = read_launched_process(SRUN, DEFAULTS)
    assert process is not None
    assert (process.rank, process.size, process.local_rank, process.local_size) == (5, 7, 1, 3)
    assert process.address == "gpu07"
    assert process.port in SLURM_PORTS
    other = read_launched_process({**SRUN, "SLURM_STEP_ID": "1"}, DEFAULTS)
    assert other is not None
    assert other.port != process.port
    named = DistributedOptions(main_process_ip="10.0.0.7", main_process_port=12345)
    process = read_launched_process(SRUN, named)
    assert process is not None
    assert (process.address, process.port) == ("10.0.0.7", 12345)


def test_a_process_that_sees_one_gpu_uses_it() -> None:
    for visible, index in (("3", 0), ("0,1,2,3", 1)):
        process = read_launched_process({**SRUN, "CUDA_VISIBLE_DEVICES": visible}, DEFAULTS)
        assert process is not None
        assert process.gpu_index == index
    process = read_launched_process(TORCHRUN, DEFAULTS)
    assert process is not None
    assert process.gpu_index == 1


def test_srun_on_one_machine_stays_on_loopback() -> None:
    one = {
        **SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
        "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "gpu07", "SLURM_STEP_TASKS_PER_NODE": "2",
    }  # fmt: skip
    process = read_launched_process(one, DEFAULTS)
    assert process is not None
    assert process.address == "127.0.0.1"
    assert variables_of_ranks(process, "linux")["GLOO_SOCKET_IFNAME"] == "lo"
    assert variables_of_ranks(process, "darwin")["GLOO_SOCKET_IFNAME"] == "lo0"


def test_several_machines_choose_their_own_interface() -> None:
    process = read_launched_process(TORCHRUN, DEFAULTS)
    assert process is not None
    assert variables_of_ranks(process, "linux") == {}


def test_torchrun_under_srun_is_torchrun() -> None:
    process = read_launched_process({**SRUN, **TORCHRUN}, DEFAULTS)
    assert process is not None
    assert process.size == 8


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[12,14]", "gpu12"),
        ("login1,gpu[07-09]", "login1"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("a[1-2]-ib,b3", "a1-ib"),
        ("", ""),
    ],
)
def test_first_host(text: str, host: str) -> None:
    assert first_host(text) == host


def test_task_counts() -> None:
    assert expand_task_counts("4(x2),3") == [4, 4, 3]
    assert expand_task_counts("2") == [2]
    assert expand_task_counts("") == []


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK"),
        ({**TORCHRUN, "RANK": "8"}, "RANK"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT"),
        ({key: value for key, value in TORCHRUN.items() if key != "MASTER_ADDR"}, "MASTER_ADDR"),
        ({**SRUN, "SLURM_NODEID": "2"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST"),
        ({key: value for key, value in SRUN.items() if key != "SLURM_PROCID"}, "SLURM_PROCID"),
    ],
)
def test_broken_variables_are_named(variables: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_launched_process(variables, DEFAULTS)
    assert [problem.location for problem in raised.value.problems] == [name]


FOUR = LaunchedProcess(0, 4, 0, 4, "127.0.0.1", 1, "srun (SLURM_NTASKS)")


def check(process: LaunchedProcess | None, **options: Any) -> None:
    origins = {name: f"--{name}" for name in options}
    check_agreement(config_from_resolved(options), process, origins)


def test_what_agrees() -> None:
    check(None)
    check(None, num_processes=2, fsdp_enable=True)
    check(FOUR)
    check(FOUR, num_processes=4, fsdp_enable=True)
    check(FOUR, num_processes="auto")


@pytest.mark.parametrize(
    ("process", "options", "location", "words"),
    [
        (FOUR, {"num_processes": 2}, "--num_processes", "2 contradicts the 4 processes that srun"),
        (FOUR, {"num_processes": 1}, "--num_processes", "1 contradicts the 4 processes"),
        (None, {"fsdp_enable": True}, "--fsdp_enable", "num_processes is 1"),
        (
            FOUR,
            {"optimizer_release_gradients": True, "max_grad_norm": 0},
            "--optimizer_release_gradients",
            "4 processes",
        ),
    ],
)
def test_contradictions_name_both_values(
    process: LaunchedProcess | None, options: dict[str, Any], location: str, words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        check(process, **options)
    assert [problem.location for problem in raised.value.problems] == [location]
    assert words in str(raised.value)
