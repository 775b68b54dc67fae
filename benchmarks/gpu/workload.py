"""The sizes of all checks: full size for a GPU, toy size for a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from simpletuner.models.chroma.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Workload:
    """Sizes and device of all checks.

    config: of the network whose steps are measured.
    slice: 2 double and 2 single blocks of the same width, for the comparisons.
    scale: of image sides; a check for 512 px computes 512 * scale.
    slice_px: image side of the comparisons.
    text_rows, padded_rows: length of the caption, and what diffusers' text is padded to.
    text_lengths: captions of the attention checks.
    backend: of torch.compile.
    weight: (rows, columns) of the matrix that is quantised.
    product: (rows, inner, columns) of the matrix products that are timed.
    warm_up, steps, seconds: untimed steps; timed steps at least; more until so many seconds.
    nano_steps: length of the training that is stopped and resumed.
    """

    toy: bool
    device: torch.device
    config: TransformerConfig
    slice: TransformerConfig
    scale: float
    slice_px: int
    text_rows: int
    padded_rows: int
    text_lengths: tuple[int, ...]
    backend: str
    weight: tuple[int, int]
    product: tuple[int, int, int]
    warm_up: int
    steps: int
    seconds: float
    nano_steps: int

    def scaled_px(self, px: int) -> int:
        return int(px * self.scale)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


FULL = Workload(
    toy=False,
    device=torch.device("cuda"),
    config=TransformerConfig(),
    slice=TransformerConfig(num_layers=2, num_single_layers=2),
    scale=1.0,
    slice_px=256,
    text_rows=128,
    padded_rows=512,
    text_lengths=(13, 29, 47, 64, 90, 121, 160, 200, 256, 333, 420, 486),
    backend="inductor",
    weight=(12288, 3072),
    product=(4224, 3072, 12288),
    warm_up=2,
    steps=3,
    seconds=1.5,
    nano_steps=50,
)
TOY_CONFIG = TransformerConfig(
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=64,
    axes_dims_rope=(8, 12, 12),
    approximator_hidden_dim=32,
    approximator_layers=1,
)
TOY = Workload(
    toy=True,
    device=torch.device("cpu"),
    config=TOY_CONFIG,
    slice=replace(TOY_CONFIG, num_layers=2),
    scale=0.125,
    slice_px=64,
    text_rows=8,
    padded_rows=16,
    text_lengths=(3, 5, 9),
    backend="eager",
    weight=(256, 64),
    product=(32, 64, 48),
    warm_up=1,
    steps=1,
    seconds=0.0,
    nano_steps=4,
)


def make_workload(toy: bool, device: str) -> Workload:
    return replace(TOY if toy else FULL, device=torch.device(device))
