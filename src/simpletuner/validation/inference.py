"""The transformer outside training: eval mode, no gradients, the dtype of the device.

B batch · C latent channels · H W latent side (image px / stride) · L text tokens · D text width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simpletuner.cache.batch_types import TextBatch
from simpletuner.models.family import ArchitectureConstants, ModelFamily


@dataclass(frozen=True)
class Inference:
    """The parts of a prediction other than the weights.

    text_dtype: of the text rows that the transformer gets. autocast: the context of training, if
    any.
    """

    family: ModelFamily
    constants: ArchitectureConstants
    device: torch.device
    text_dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    def predict_velocity(
        self, transformer: nn.Module, x_sigma: Tensor, sigma: Tensor, text: TextBatch
    ) -> Tensor:
        """Return the velocity (B, C, H, W) float32; text must be on the device already."""
        with self.autocast():
            return self.family.predict_velocity(transformer, x_sigma, sigma, text).float()


@contextmanager
def eval_mode(transformer: nn.Module) -> Iterator[None]:
    """Disable gradients and set eval mode; every module gets its own mode back afterwards."""
    training = [module for module in transformer.modules() if module.training]
    transformer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
