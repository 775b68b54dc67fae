"""Chroma's modulation vectors, computed ahead for several sigmas.

They are a function of sigma alone, so the approximator, 0.56 GB in bf16, need not be on the device
while the blocks run: its weights are in host memory, are copied to the device for the sigmas of
many steps at once, and leave it again. The vectors, 2.1 MB for each sigma, wait in host memory too.

The approximator computes each sigma by itself (Approximator.forward), so that its vectors do not
depend on which sigmas are computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MIN_PREPARED_SIGMAS = 256  # so many are kept at least: a chunk of training, and those of validation


class PreparedModulations:
    """Modulation vectors by sigma, of an approximator that is in host memory.

    device: where the blocks run. computes_on_device: the weights are copied there to be used; if
    false, the vectors are computed on the CPU, where they are rounded differently.
    """

    def __init__(
        self,
        approximator: nn.Module,
        compute: Callable[[Tensor], Tensor],
        device: torch.device,
        computes_on_device: bool,
    ) -> None:
        """compute: sigma (B,) to modulation vectors (B, M, W), where the approximator is."""
        self._approximator = approximator
        self._compute = compute
        self._device = device
        self._computes_on_device = computes_on_device
        self._by_sigma: dict[float, Tensor] = {}

    def prepare(self, sigma: Tensor) -> None:
        """Compute the vectors of sigma (B,) that are not there yet, each once.

        Those that were used the longest ago are dropped where there are too many.
        """
        wanted = dict.fromkeys(sigma.tolist())
        missing = [value for value in wanted if value not in self._by_sigma]
        if missing:
            with self._weights_in_place():
                for value in missing:
                    self._by_sigma[value] = self._to_host(self._compute(torch.tensor([value])))
        for value in wanted:
            self._by_sigma[value] = self._by_sigma.pop(value)  # the last one was used last
        while len(self._by_sigma) > max(MIN_PREPARED_SIGMAS, len(wanted)):
            del self._by_sigma[next(iter(self._by_sigma))]

    def find(self, sigma: Tensor) -> Tensor:
        """Return the vectors of sigma (B,), (B, M, W) on the device; absent ones are computed now.

        A sigma on the CPU costs no synchronisation.
        """
        self.prepare(sigma)
        return torch.cat(
            [self._by_sigma[value].to(self._device, non_blocking=True) for value in sigma.tolist()]
        )

    def _to_host(self, vectors: Tensor) -> Tensor:
        if vectors.device.type != "cuda":
            return vectors.cpu()
        host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        return host.copy_(vectors)

    @contextmanager
    def _weights_in_place(self) -> Iterator[None]:
        """Have the approximator's weights on the computing device inside the context."""
        if not self._computes_on_device:
            yield
            return
        tensors = [*self._approximator.parameters(), *self._approximator.buffers()]
        on_host = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = copy_to(tensor.data, self._device)
            yield
        finally:
            for tensor, host in zip(tensors, on_host, strict=True):
                tensor.data = host


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device, without waiting for the copy."""
    return tensor.to(device, non_blocking=True)
