"""What is measured, most telling first: the clock cuts the list off, never the order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from simpletuner.models.chroma.transformer import TransformerConfig

PRECISIONS = ("no_change", "int8", "int4", "nf4")
SIZES = (512, 1024, 768)
NAMES = {"no_change": "bf16"}
LORA = {"lora_rank": 16, "flux_lora_target": "all+ffs"}
FULL = {"model_type": "full", "optimizer": "adamw_8bit", "optimizer_release_gradients": True,
        "grad_clip_method": "value"}  # fmt: skip
HOST = {"chroma_approximator_device": "cpu", "gradient_checkpointing_backend": "offload"}
ALL_BLOCKS = 57


@dataclass(frozen=True)
class World:
    """How large everything is. scale: pixels of a case to pixels that are fed. text_rows: of the caption.

    padded_rows: what the peer's text is padded to. backend: of torch.compile. weight: (rows, columns) that is
    restored. warm_up: steps before any is timed. steps: timed at least; more until `seconds` have passed.
    """

    config: TransformerConfig
    scale: float
    text_rows: int
    padded_rows: int
    backend: str
    weight: tuple[int, int]
    warm_up: int
    steps: int
    seconds: float
    device: str

    def px(self, case: Case) -> int:
        return int(case.px * self.scale)


FULL_SIZE = World(TransformerConfig(), 1.0, 128, 512, "inductor", (12288, 3072), 2, 3, 1.5, "cuda")
TOY = World(
    TransformerConfig(
        num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=64, axes_dims_rope=(8, 12, 12), approximator_hidden_dim=32, approximator_layers=1,
    ),
    0.125, 8, 16, "eager", (256, 64), 1, 1, 0.0, "cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """kind: "ours" (the product's step), "theirs" (diffusers and PEFT) or "restore" (a scheme's speed).

    precision, recomputed, compiled: as the table's columns. options: of the run, beyond these.
    """

    name: str
    kind: str
    px: int = 0
    precision: str = "no_change"
    recomputed: bool = True
    compiled: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def flat(self, world: World) -> dict[str, Any]:
        """The run's options, as a config file would have them."""
        wide = {} if "model_type" in self.options else LORA
        return {
            **wide, "base_model_precision": self.precision, "gradient_checkpointing": self.recomputed,
            "dynamo_backend": world.backend if self.compiled else "no", "device": world.device,
            "resolution": float(world.px(self)), "tokenizer_max_length": world.text_rows, **self.options,
        }  # fmt: skip


def step(
    px: int, precision: str = "no_change", recomputed: bool = True, compiled: bool = False,
    kind: str = "ours", what: str = "", **options: Any,
) -> Case:  # fmt: skip
    words = [kind, NAMES.get(precision, precision), str(px), "recomputed" if recomputed else "kept"]
    words += ["compiled"] * compiled + [what] * bool(what)
    return Case(" ".join(words), kind, px, precision, recomputed, compiled, options)


def restore(scheme: str) -> Case:
    return Case(f"restore {scheme}", "restore", precision=scheme)


def telling() -> Iterator[Case]:
    """What the README and the plan's constants rest on."""
    for px in (512, 1024):
        yield step(px, kind="theirs")
        yield step(px)
    yield step(1024, "nf4")
    yield step(1024, "int8")
    yield step(1024, "int4")
    yield from map(restore, PRECISIONS[1:])
    yield step(512, recomputed=False, kind="theirs")
    yield step(512, recomputed=False)
    yield step(512, "nf4")
    yield step(512, "nf4", what="all swapped", musubi_blocks_to_swap=ALL_BLOCKS, **HOST)
    yield step(1024, "nf4", what="all swapped", musubi_blocks_to_swap=ALL_BLOCKS, **HOST)
    yield step(1024, what="half swapped", musubi_blocks_to_swap=0.5)
    yield step(1024, "nf4", what="inputs on host", **HOST)
    yield step(1024, what="full rank", **FULL)
    yield step(1024, what="full rank, states on host", optimizer_cpu_offload_method="states", **FULL)
    yield step(512, what="full rank", **FULL)
    yield step(512, compiled=True)
    yield step(1024, "nf4", compiled=True)
    yield step(1024, compiled=True)
    yield step(1024, kind="theirs", compiled=True)
    yield step(1024, recomputed=False, kind="theirs")
    yield step(768, kind="theirs")


def cases() -> list[Case]:
    """All of them: the telling ones, then the rest of precision x size x recomputed, compiled ones last."""
    grid = [
        step(px, precision, recomputed, compiled)
        for compiled, px, recomputed, precision in itertools.product(
            (False, True), SIZES, (True, False), PRECISIONS
        )
    ]
    return list({case.name: case for case in (*telling(), *grid)}.values())
