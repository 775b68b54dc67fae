"""What is asked of a device by name, on devices that are made up."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from simpletuner.config import environment
from simpletuner.config.schema import ModelOptions, RunConfig
from simpletuner.errors import ConfigError, SimpleTunerError
from simpletuner.training import device as devices
from simpletuner.training.device import (
    ComputeDevice,
    Hardware,
    describe_attention,
    describe_out_of_memory,
    select_device,
    split_when_out_of_memory,
    unsupported_by_hardware,
)
from simpletuner.training.run import to_user_error


class Fake(Hardware):
    def __init__(self, kind: str, capability: tuple[int, int] | None = None) -> None:
        self.kind = kind
        self._capability = capability
        self.emptied = 0

    @property
    def name(self) -> str:
        return f"a made-up {self.kind}"

    def capability(self) -> tuple[int, int] | None:
        return self._capability

    def free_bytes(self) -> int:
        return 3 * 2**30

    def peak_bytes(self) -> int:
        return 5 * 2**30

    def empty_cache(self) -> None:
        self.emptied += 1


TURING, AMPERE, ROCM, MPS, CPU = (
    Fake("cuda", (7, 5)), Fake("cuda", (8, 6)), Fake("rocm"), Fake("mps"), Fake("cpu"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("hardware", "options", "said"),
    [
        (TURING, {}, "compute capability 8.0 or newer; this is a made-up cuda, 7.5"),
        (TURING, {"mixed_precision": "no"}, None),
        (AMPERE, {}, None),
        (ROCM, {"musubi_blocks_to_swap": 3}, None),
        (AMPERE, {"musubi_blocks_to_swap": 3, "gradient_checkpointing_backend": "offload"}, None),
        (MPS, {}, None),
        (MPS, {"musubi_blocks_to_swap": 0.5}, "Use 0"),
        (MPS, {"gradient_checkpointing_backend": "offload"}, 'Use "torch"'),
        (MPS, {"base_model_precision": "fp8"}, 'base_model_precision = "fp8"'),
        (MPS, {"text_encoder_1_precision": "fp8"}, 'Use "int8"'),
        (MPS, {"base_model_precision": "nf4"}, None),
        (CPU, {"mixed_precision": "fp16"}, 'use "bf16" or "no"'),
        (CPU, {"musubi_blocks_to_swap": 1}, "this is a made-up cpu"),
        (CPU, {}, None),
    ],
)
def test_what_a_device_lacks(hardware: Hardware, options: dict[str, Any], said: str | None) -> None:
    found = list(unsupported_by_hardware(hardware, ModelOptions(**options)))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_everything_that_is_missing_at_once() -> None:
    options = ModelOptions(
        device="cpu",
        musubi_blocks_to_swap=2,
        gradient_checkpointing_backend="offload",
        mixed_precision="fp16",
    )
    with pytest.raises(ConfigError) as refusal:
        select_device(options)
    assert str(refusal.value).count("\n") == 2


def test_a_device_by_its_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices.HARDWARE_BY_TYPE, "cuda", lambda device: AMPERE)
    chosen = ComputeDevice(torch.device("cuda"), torch.bfloat16, None)
    assert str(chosen) == "a made-up cuda, bfloat16 weights"
    assert chosen.peak_memory_gib() == 5.0


def test_the_cpu_says_nothing_of_memory() -> None:
    hardware = select_device(ModelOptions(device="cpu")).hardware
    assert select_device(ModelOptions(device="cpu")).peak_memory_gib() is None
    assert (hardware.kind, hardware.free_bytes(), hardware.capability()) == ("cpu", None, None)


CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 162.00 MiB. GPU 0 has a total capacity of 11.75 GiB of which"
    " 23.19 MiB is free. Including non-PyTorch memory, this process has 11.59 GiB memory in use."
)
MPS_TEXT = (
    "MPS backend out of memory (MPS allocated: 17.94 GiB, other allocations: 416.00 KiB, max allowed:"
    " 18.13 GiB). Tried to allocate 256.00 MiB on private pool."
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(CUDA_TEXT), "out of memory: 162.00 MiB requested, 23.19 MiB free"),
        (RuntimeError(MPS_TEXT), "out of memory: 256.00 MiB requested, max allowed: 18.13 GiB"),
        (
            RuntimeError("CUDA error: out of memory\nmore"),
            "out of memory: CUDA error: out of memory",
        ),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            "out of memory: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
            "out of memory: cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        ),
        (MemoryError(), "out of host memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_where_memory_ran_out(error: BaseException, said: str | None) -> None:
    assert describe_out_of_memory(error) == said


def test_what_this_torch_says_of_host_memory() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**60, dtype=torch.uint8)
    assert describe_out_of_memory(failure.value) == f"out of memory: {2**60} bytes requested"


def test_the_next_setting_down_is_told() -> None:
    run = RunConfig(model=ModelOptions(gradient_checkpointing=False))
    known = to_user_error(torch.OutOfMemoryError(CUDA_TEXT), run)
    assert isinstance(known, SimpleTunerError)
    assert "23.19 MiB free. The last checkpoint is not affected" in str(known)
    assert "gradient_checkpointing = true" in str(known)
    assert to_user_error(RuntimeError("a mistake of ours"), run) is None


def test_casts_of_a_sharded_network_are_not_kept() -> None:
    options = ModelOptions(device="cpu", mixed_precision="bf16", base_model_default_dtype="fp32")
    for caches in (True, False):
        with select_device(options, caches_casts=caches).autocast():
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_cache_enabled() is caches


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A made-up GPU; what torch is set to for it is set back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(devices.HARDWARE_BY_TYPE, "cuda", lambda device: AMPERE)
    cuda = torch.backends.cuda
    before = cuda.cudnn_sdp_enabled(), cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield AMPERE
    cuda.enable_cudnn_sdp(before[0])
    cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[1:]
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_a_gpu_never_plans_attention_for_a_new_length(a_gpu: Fake) -> None:
    chosen = select_device(ModelOptions(device="cuda"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert "flash" in str(describe_attention(chosen))
    exact = select_device(ModelOptions(device="cuda", mixed_precision="no"))
    assert "memory-efficient" in str(describe_attention(exact))
    master = ModelOptions(device="cuda", base_model_default_dtype="fp32")
    assert "flash" in str(describe_attention(select_device(master)))
    assert describe_attention(select_device(ModelOptions(device="cpu"))) is None


def test_deterministic_algorithms_are_an_option(a_gpu: Fake) -> None:
    select_device(ModelOptions(device="cuda"))
    assert not torch.are_deterministic_algorithms_enabled()
    select_device(ModelOptions(device="cuda", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_a_batch_that_does_not_fit_is_encoded_one_by_one() -> None:
    hardware, sizes = Fake("cuda"), []

    def encode(batch: torch.Tensor, most: int, error: str) -> torch.Tensor:
        sizes.append(len(batch))
        if len(batch) > most:
            raise RuntimeError(error)
        return batch + 1

    batch, no_memory = torch.arange(6.0).view(3, 2), "CUDA out of memory."
    split = split_when_out_of_memory(lambda rows: encode(rows, 1, no_memory), hardware)
    assert torch.equal(split(batch), batch + 1)
    assert (sizes, hardware.emptied) == ([3, 1, 1, 1], 1)
    for most, error in ((0, no_memory), (1, "a bug")):
        split = split_when_out_of_memory(partial(encode, most=most, error=error), hardware)
        with pytest.raises(RuntimeError, match=error):
            split(batch)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has segments that grow")
def test_memory_segments_grow_unless_the_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*environment.ALLOCATOR_VARIABLES, "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    environment.set_device_variables(deterministic=False)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    environment.set_device_variables(deterministic=True)
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
