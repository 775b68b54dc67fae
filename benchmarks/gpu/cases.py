"""What is measured, most telling first: the clock cuts the list off, never the order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from simpletuner.models.chroma.transformer import TransformerConfig

PRECISIONS = ("no_change", "int8", "int4", "nf4")
SIZES = (512, 1024, 768)
PRECISION_LABELS = {"no_change": "bf16"}
LORA_OPTIONS = {"lora_rank": 16, "flux_lora_target": "all+ffs"}
FULL_RANK_OPTIONS = {"model_type": "full", "optimizer": "adamw_8bit", "optimizer_release_gradients": True,
        "grad_clip_method": "value"}  # fmt: skip
OFFLOAD_OPTIONS = {"chroma_approximator_device": "cpu", "gradient_checkpointing_backend": "offload"}
ALL_BLOCKS = 57


@dataclass(frozen=True)
class SuiteSize:
    """How large everything is. scale: pixels of a case to pixels that are fed. text_rows: of the caption.

    padded_rows: what the peer's text is padded to. backend: of torch.compile. weight: (rows, columns) that is
    restored. warm_up: steps before any is timed. steps: timed at least; more until `seconds` have passed.
    """

    config: TransformerConfig
    scale: float
    text_rows: int
    padded_rows: int
    backend: str
    weight_shape: tuple[int, int]
    warm_up: int
    steps: int
    min_seconds: float
    device: str

    def scaled_px(self, case: Case) -> int:
        return int(case.px * self.scale)


FULL_SIZE = SuiteSize(TransformerConfig(), 1.0, 128, 512, "inductor", (12288, 3072), 2, 3, 1.5, "cuda")
TOY_SIZE = SuiteSize(
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

    def run_options(self, world: SuiteSize) -> dict[str, Any]:
        """The run's options, as a config file would have them."""
        wide = {} if "model_type" in self.options else LORA_OPTIONS
        return {
            **wide, "base_model_precision": self.precision, "gradient_checkpointing": self.recomputed,
            "dynamo_backend": world.backend if self.compiled else "no", "device": world.device,
            "resolution": float(world.scaled_px(self)), "tokenizer_max_length": world.text_rows, **self.options,
        }  # fmt: skip


def step_case(
    px: int, precision: str = "no_change", recomputed: bool = True, compiled: bool = False,
    kind: str = "ours", what: str = "", **options: Any,
) -> Case:  # fmt: skip
    words = [
        kind,
        PRECISION_LABELS.get(precision, precision),
        str(px),
        "recomputed" if recomputed else "kept",
    ]
    words += ["compiled"] * compiled + [what] * bool(what)
    return Case(" ".join(words), kind, px, precision, recomputed, compiled, options)


def restore_case(scheme: str) -> Case:
    return Case(f"restore {scheme}", "restore", precision=scheme)


def key_cases() -> Iterator[Case]:
    """What the README and the plan's constants rest on."""
    for px in (512, 1024):
        yield step_case(px, kind="theirs")
        yield step_case(px)
    yield step_case(1024, "nf4")
    yield step_case(1024, "int8")
    yield step_case(1024, "int4")
    yield from map(restore_case, PRECISIONS[1:])
    yield step_case(512, recomputed=False, kind="theirs")
    yield step_case(512, recomputed=False)
    yield step_case(512, "nf4")
    yield step_case(512, "nf4", what="all swapped", musubi_blocks_to_swap=ALL_BLOCKS, **OFFLOAD_OPTIONS)
    yield step_case(1024, "nf4", what="all swapped", musubi_blocks_to_swap=ALL_BLOCKS, **OFFLOAD_OPTIONS)
    yield step_case(1024, what="half swapped", musubi_blocks_to_swap=0.5)
    yield step_case(1024, "nf4", what="inputs on host", **OFFLOAD_OPTIONS)
    yield step_case(1024, what="full rank", **FULL_RANK_OPTIONS)
    yield step_case(
        1024, what="full rank, states on host", optimizer_cpu_offload_method="states", **FULL_RANK_OPTIONS
    )
    yield step_case(512, what="full rank", **FULL_RANK_OPTIONS)
    yield step_case(512, compiled=True)
    yield step_case(1024, "nf4", compiled=True)
    yield step_case(1024, compiled=True)
    yield step_case(1024, kind="theirs", compiled=True)
    yield step_case(1024, recomputed=False, kind="theirs")
    yield step_case(768, kind="theirs")


def all_cases() -> list[Case]:
    """All of them: the telling ones, then the rest of precision x size x recomputed, compiled ones last."""
    grid = [
        step_case(px, precision, recomputed, compiled)
        for compiled, px, recomputed, precision in itertools.product(
            (False, True), SIZES, (True, False), PRECISIONS
        )
    ]
    return list({case.name: case for case in (*key_cases(), *grid)}.values())
