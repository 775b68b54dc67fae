"""The exponential moving average (EMA) of the trained weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from simpletuner.config.schema import OptimizerOptions
from simpletuner.errors import CheckpointError
from simpletuner.training.gradient_sum import make_buckets


class WholeParams(Protocol):
    """Return a context in which parameters can be read, or written by every process equally."""

    def __call__(
        self, params: Sequence[nn.Parameter], write: bool = False
    ) -> AbstractContextManager[None]: ...


def params_as_they_are(
    params: Sequence[nn.Parameter], write: bool = False
) -> AbstractContextManager[None]:
    """Do nothing: every process holds them."""
    return nullcontext()


def resolve_ema_device(
    options: OptimizerOptions, trains_adapter: bool
) -> Literal["cpu", "accelerator"]:
    """Return where the average is held; "auto" is the accelerator for an adapter, which is small.

    From a GPU to the CPU every parameter would be a copy of its own that the host waits for.
    """
    if options.ema_device != "auto":
        return options.ema_device
    return "accelerator" if trains_adapter else "cpu"


class Ema:
    """Average: shadow <- shadow + (1 - d) * (weights - shadow), every ema_update_interval steps.

    d = min(ema_decay, (1 + n) / (10 + n)) at update n = 0, 1, ..., so that the average of a short
    run is not dominated by the initial weights. shadow: name -> float32, on the CPU or on the
    device of the weights.
    """

    def __init__(
        self,
        params: Sequence[tuple[str, nn.Parameter]],
        options: OptimizerOptions,
        whole_params: WholeParams = params_as_they_are,
    ) -> None:
        self.params = list(params)
        self._whole_params = whole_params
        self.decay, self.interval = options.ema_decay, options.ema_update_interval
        self.updates = 0
        on_cpu = options.ema_device == "cpu"
        self.shadow: dict[str, Tensor] = {}
        for name, param in self.params:
            target = torch.device("cpu") if on_cpu else param.device
            self.shadow[name] = self._copy(param, target, torch.float32)

    def _copy(
        self, param: nn.Parameter, device: torch.device, dtype: torch.dtype | None = None
    ) -> Tensor:
        with self._whole_params([param]):
            return param.detach().to(device, dtype or param.dtype, copy=True)

    def _write(self, param: nn.Parameter, weights: Tensor) -> None:
        with self._whole_params([param], write=True):
            param.copy_(weights)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update after optimizer step `step` (0 is the first)."""
        if (step + 1) % self.interval:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        # Buckets group tensors by dtype and size, so each shadow must be traced to its parameter.
        param_of = {id(self.shadow[name]): param for name, param in self.params}
        for shadows in make_buckets([self.shadow[name] for name, _ in self.params]):
            params = [param_of[id(shadow)] for shadow in shadows]
            with self._whole_params(params):
                weights = [
                    param.detach().to(shadow.device, torch.float32)
                    for param, shadow in zip(params, shadows, strict=True)
                ]
                torch._foreach_lerp_(shadows, weights, 1 - decay)

    @contextmanager
    def swapped_weights(self) -> Iterator[None]:
        """Put the averaged weights into the network; the trained ones are restored bit for bit.

        Meanwhile the trained weights are stored on the device of the average, because in full
        fine-tuning a GPU may not have memory for both.
        """
        # Copies, not exchanged pointers: the optimizer and FSDP2 hold these tensors.
        trained = [self._copy(param, self.shadow[name].device) for name, param in self.params]
        with torch.no_grad():
            for name, param in self.params:
                self._write(param, self.shadow[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, param), weights in zip(self.params, trained):
                    self._write(param, weights)

    def state_dict(self) -> dict[str, Any]:
        """Return {"updates": int, "shadow": {name: float32 tensor}}; the tensors are not copied."""
        return {"updates": self.updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state.

        Raises CheckpointError when its names or shapes are not those of the trained weights.
        """
        shadow: dict[str, Tensor] = state["shadow"]
        expected = {name: tensor.shape for name, tensor in self.shadow.items()}
        if {name: tensor.shape for name, tensor in shadow.items()} != expected:
            raise CheckpointError(
                "the saved moving average (EMA) belongs to other trainable parameters"
            )
        self.updates = int(state["updates"])
        for name, tensor in shadow.items():
            self.shadow[name].copy_(tensor)
