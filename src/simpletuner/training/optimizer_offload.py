"""Optimizer states in host memory: those of a parameter visit the device while it is stepped.

Slower by what the bus needs for them, there and back, in every step; the numbers are the same.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from simpletuner.errors import ConfigError


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


class LockedPages(mmap.mmap):
    """Memory that is unlocked before it is given back.

    The driver remembers addresses: a later mapping at the same one would be refused as locked
    already.
    """

    locked_at = 0

    def __del__(self) -> None:
        if self.locked_at:
            torch.cuda.cudart().cudaHostUnregister(self.locked_at)


def copy_to_pinned_host(tensor: Tensor) -> Tensor:
    """A copy in page-locked memory of its exact size; torch's own locked memory grows to a power of two."""
    if not tensor.numel():
        return tensor.cpu()
    owner = LockedPages(-1, tensor.nbytes)
    pages = torch.frombuffer(owner, dtype=torch.uint8)
    failed = int(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), tensor.nbytes, 0))
    if failed:
        raise ConfigError(
            f"the driver locks no more of the host's memory (error {failed}): optimizer_cpu_offload_method "
            'has no room for the states; use a smaller optimizer, as adamw_8bit or adafactor, or "none"'
        )
    owner.locked_at = pages.data_ptr()
    return pages.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class OffloadedOptimizerState:
    """fetch, keep: how a tensor goes to a device, and how it comes to the host for the first time.

    Counters (tensors of no dimension) stay where the optimizer has them.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        fetch: Callable[[Tensor, torch.device], Tensor] = copy_to_device,
        keep: Callable[[Tensor], Tensor] = copy_to_pinned_host,
    ) -> None:
        self.optimizer, self.to_device, self.to_host = optimizer, fetch, keep

    @contextmanager
    def on_device(self, param: Tensor) -> Iterator[None]:
        """The states of `param` are beside it inside, and on the host again after."""
        state = self.optimizer.state[param]
        home = {
            key: tensor for key, tensor in state.items() if torch.is_tensor(tensor) and tensor.ndim
        }
        for key, tensor in home.items():
            state[key] = self.to_device(tensor, param.device)
        yield
        for key, tensor in state.items():
            if key in home:
                state[key] = home[key].copy_(tensor, non_blocking=True)
            elif torch.is_tensor(tensor) and tensor.ndim:
                state[key] = self.to_host(tensor)

    def synchronize(self) -> None:
        """Wait for what is still on its way to the host: a checkpoint may read it next."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
