"""Optimizer state in host memory; a parameter's state is on the device only while it is stepped.

Each step is slower by the time to copy the state over the bus and back. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from simpletuner.errors import ConfigError
from simpletuner.models.page_locked import PageLockRefused, copy_to_page_locked


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting; the copy is ordered before the kernels that are launched after it."""
    return tensor.to(device, non_blocking=True)


def copy_to_pinned_host(tensor: Tensor) -> Tensor:
    """Copy to page-locked memory. Raises ConfigError when the driver does not lock that much."""
    try:
        return copy_to_page_locked(tensor)
    except PageLockRefused as error:
        raise ConfigError(
            f"the driver cannot lock more host memory ({error}), so "
            "optimizer_cpu_offload_method has no memory for the optimizer state; use an optimizer "
            "with a smaller state, such as adamw_8bit or adafactor, or "
            'optimizer_cpu_offload_method "none"'
        ) from error


class OffloadedOptimizerState:
    """Moves the state of one parameter at a time.

    to_device, to_host: copy a tensor to a device, and to the host for the first time. Counters
    (tensors without dimensions) are not moved.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        to_device: Callable[[Tensor, torch.device], Tensor] = copy_to_device,
        to_host: Callable[[Tensor], Tensor] = copy_to_pinned_host,
    ) -> None:
        self.optimizer = optimizer
        self.to_device = to_device
        self.to_host = to_host

    @contextmanager
    def on_device(self, param: Tensor) -> Iterator[None]:
        """Have the state of `param` on its device inside the context, and on the host afterwards.

        The tensors on the host are reused; only state that the step created is copied to new ones.
        """
        state = self.optimizer.state[param]
        on_host = {
            key: tensor for key, tensor in state.items() if torch.is_tensor(tensor) and tensor.ndim
        }
        for key, tensor in on_host.items():
            state[key] = self.to_device(tensor, param.device)
        yield
        for key, tensor in state.items():
            if key in on_host:
                # Ordered after the step on the same stream; `synchronize` waits for all of them at
                # once.
                state[key] = on_host[key].copy_(tensor, non_blocking=True)
            elif torch.is_tensor(tensor) and tensor.ndim:
                state[key] = self.to_host(tensor)

    def synchronize(self) -> None:
        """Wait for pending copies to the host, because a checkpoint may read the state next."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
