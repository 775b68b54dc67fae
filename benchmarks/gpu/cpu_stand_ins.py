"""Stand-ins on a CPU for what only a GPU has, so that a rehearsal runs swapping and offloading.

Blocks are copied within host memory. That proves the calls and their order as far as a CPU can, not
the streams and events of CUDA. On a GPU nothing is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import torch
from benchmarks.gpu.workload import Workload
from torch import Tensor
from torch.optim import Optimizer

from simpletuner.config.schema import OptimizerOptions
from simpletuner.models import block_executor
from simpletuner.models.block_swap import DeviceBuffer, TransferEngine
from simpletuner.training import device as device_module
from simpletuner.training import optimizer_step, optimizers
from simpletuner.training.optimizer_offload import OffloadedOptimizerState, copy_to_device


class HostBuffer(DeviceBuffer):
    """A buffer that is filled when its content is first waited for, as by an asynchronous copy."""

    def __init__(self, size: int) -> None:
        self.memory = torch.zeros(size, dtype=torch.uint8)
        self._pending: Tensor | None = None

    def start_copy(self, host_bytes: Tensor) -> None:
        self._pending = host_bytes

    def wait_for_copy(self) -> None:
        if self._pending is not None:
            self.memory[: len(self._pending)].copy_(self._pending)
            self._pending = None

    def record_last_use(self) -> None:
        """Do nothing: no computation runs at the same time."""


class HostTransferEngine(TransferEngine):
    """Transfers from host memory to host memory."""

    def pin_memory(self, host_bytes: Tensor) -> Tensor:
        return host_bytes.clone()

    def allocate_buffer(self, size: int) -> DeviceBuffer:
        return HostBuffer(size)

    def offload_saved_tensors(self) -> AbstractContextManager[object]:
        return torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)


@contextmanager
def cpu_stand_ins(workload: Workload) -> Iterator[None]:
    """Let a CPU swap blocks, offload inputs and keep optimizer states apart."""
    if workload.on_gpu:
        yield
        return

    def is_offloaded(options: OptimizerOptions, device: torch.device) -> bool:
        return options.optimizer_cpu_offload_method == "states"

    def offloaded_state(optimizer: Optimizer) -> OffloadedOptimizerState:
        return OffloadedOptimizerState(optimizer, copy_to_device, torch.clone)

    engine = HostTransferEngine()
    with (
        mock.patch.object(block_executor, "create_transfer_engine", return_value=engine),
        mock.patch.object(device_module, "unsupported_by_hardware", return_value=()),
        mock.patch.object(optimizer_step, "is_state_offloaded", is_offloaded),
        mock.patch.object(optimizers, "is_state_offloaded", is_offloaded),
        mock.patch.object(optimizers, "copy_to_pinned_host", torch.clone),
        mock.patch.object(optimizer_step, "OffloadedOptimizerState", offloaded_state),
    ):
        yield
