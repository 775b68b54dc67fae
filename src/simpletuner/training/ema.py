"""A moving average of the trained weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.config.schema import OptimizerOptions
from simpletuner.errors import CheckpointError


class Ema:
    """shadow <- shadow + (1 - d) * (weights - shadow) after every ema_update_interval-th step.

    d = min(ema_decay, (1 + n) / (10 + n)) at update n = 0, 1, ..., so that a short run is not
    mostly its start. shadow: name -> float32, on the CPU or beside the weights.
    """

    def __init__(
        self, params: Sequence[tuple[str, nn.Parameter]], options: OptimizerOptions
    ) -> None:
        self.params = list(params)
        self.decay, self.interval = options.ema_decay, options.ema_update_interval
        self.updates = 0
        on_cpu = options.ema_device == "cpu"
        self.shadow: dict[str, Tensor] = {
            name: param.detach().to("cpu" if on_cpu else param.device, torch.float32, copy=True)
            for name, param in self.params
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call after optimizer step `step` (0 is the first)."""
        if (step + 1) % self.interval:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, param in self.params:
            shadow = self.shadow[name]
            shadow.lerp_(param.detach().to(shadow.device, torch.float32), 1 - decay)

    @contextmanager
    def swapped_weights(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones; these come back bit for bit.

        They wait where the average is kept: at full rank a GPU has no room for both.
        """
        trained = [
            param.detach().to(self.shadow[name].device, copy=True) for name, param in self.params
        ]
        with torch.no_grad():
            for name, param in self.params:
                param.copy_(self.shadow[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, param), kept in zip(self.params, trained):
                    param.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """{"updates": int, "shadow": {name: float32 tensor}}; the tensors are the live ones."""
        return {"updates": self.updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuses another set of names or shapes (CheckpointError)."""
        shadow: dict[str, Tensor] = state["shadow"]
        mine = {name: tensor.shape for name, tensor in self.shadow.items()}
        if {name: tensor.shape for name, tensor in shadow.items()} != mine:
            raise CheckpointError("the saved moving average belongs to other trainable parameters")
        self.updates = int(state["updates"])
        for name, tensor in shadow.items():
            self.shadow[name].copy_(tensor)
