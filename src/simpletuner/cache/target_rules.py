"""The targets of each sample and their weights: the image itself, and the base's prediction.

One form covers masks, regularisation datasets and preservation by captions. A row of a batch has a
weight for each of the two targets in every cell of its latent:

    loss = mean(data * error(v, noise - x0) + base * error(v, v_base))

v_base is the prediction of the base, the network with its adapter switched off, at the same input.

    row                                     data                    base
    plain image                             1                       0
    image with mask m                       m / mean(m)             outside * (1 - m) / mean(1 - m)
    regularisation, target images           prior                   0
    regularisation, target base             0                       prior
    class or empty caption of an image      0                       preservation

A masked mean weighted by area, sum(m error) / sum(m), is the mean of error times m / mean(m). A
mask on a regularisation image multiplies its weight in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simpletuner.cache.batch_types import TargetWeights


@dataclass(frozen=True)
class PreservedCaption:
    """The caption with which an image is trained towards the base's prediction.

    trigger: what class_caption replaces in a caption. It is the whole caption where the trigger
    does not occur, or is empty.
    """

    class_caption: str
    trigger: str = ""

    def of(self, caption: str) -> str:
        if self.trigger and self.trigger in caption:
            return caption.replace(self.trigger, self.class_caption)
        return self.class_caption


@dataclass(frozen=True)
class TargetRules:
    """The targets and weights of a run.

    regularisation: dataset id -> "base" or "images", for the regularisation datasets.
    outside_weight: outside of masks, towards the base. preserved: None trains no second caption.
    """

    regularisation: Mapping[str, str] = field(default_factory=dict)
    prior_weight: float = 1.0
    outside_weight: float = 0.0
    preserved: PreservedCaption | None = None
    preservation_weight: float = 1.0

    def uses_base(self) -> bool:
        """Return whether some row may be trained towards the base's prediction."""
        return (
            "base" in self.regularisation.values()
            or self.outside_weight > 0
            or self.preserved is not None
        )

    def captions(self, captions: Iterable[str]) -> set[str]:
        """Return the captions with which these are trained in addition; "" is one of them."""
        if self.preserved is None:
            return set()
        return {self.preserved.of(caption) for caption in ("", *captions)}

    def has_copies(self, datasets: Sequence[str]) -> bool:
        """Return whether samples of these datasets are trained with a second caption too."""
        return self.preserved is not None and not any(
            dataset in self.regularisation for dataset in datasets
        )

    def weigh(
        self, datasets: Sequence[str], masks: Sequence[Tensor | None], copies: int
    ) -> TargetWeights | None:
        """Return the weights of all rows of a batch; None where all of them are plain images.

        datasets, masks: one per sample. A mask is (H, W) in [0, 1], not black.
        """
        plain = not any(dataset in self.regularisation for dataset in datasets)
        if plain and copies == 1 and all(mask is None for mask in masks):
            return None
        size = next((mask.shape for mask in masks if mask is not None), torch.Size((1, 1)))
        rows = [
            self._weigh_sample(dataset, mask, size)
            for dataset, mask in zip(datasets, masks, strict=True)
        ]
        nothing, full = torch.zeros(1, *size), torch.ones(1, *size)
        rows += [(nothing, full * self.preservation_weight)] * (len(datasets) * (copies - 1))
        data, base = (torch.stack(parts) for parts in zip(*rows, strict=True))
        base_rows = [row for row, weight in enumerate(base) if bool(weight.any())]
        return TargetWeights(data, base, tuple(base_rows))

    def _weigh_sample(
        self, dataset: str, mask: Tensor | None, size: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Return the data and base weights of one sample, (1, H, W) each."""
        inside, outside = torch.ones(1, *size), torch.zeros(1, *size)
        if mask is not None:
            levels = mask.double()[None]
            inside = (levels / levels.mean()).float()  # exactly 1 for a white mask
            rest = 1 - levels
            if self.outside_weight and bool(rest.any()):
                outside = (self.outside_weight * rest / rest.mean()).float()
        target = self.regularisation.get(dataset)
        if target is None:
            return inside, outside
        inside = inside * self.prior_weight
        if target == "images":
            return inside, outside
        return torch.zeros_like(inside), inside + outside
