"""Rows of the table `methods`: finer control, batch sizes, numbers of images, captions.

Plain data, from which experiments.py makes variants and tables. Every row trains the example's lesson
for the same steps, unless its label says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.nano.verdicts import RULE_IN_WORDS

SINGLE_BLOCKS, EDGE_BLOCKS = (
    r"single_transformer_blocks\..*",
    r"(transformer_blocks\.0|single_transformer_blocks\.7)\..*",
)
AVERAGED_CHECKPOINTS = 3
CHECKPOINTS_OF_AVERAGED = 5  # saved during the training, the last of which are averaged


@dataclass(frozen=True)
class MethodRow:
    """label: in the table. data: see experiment_inputs.py. program: a key of PROGRAMS.

    batch: for rows of another batch size, which train as many images; None for the lesson's.
    """

    label: str
    variant: str
    options: Mapping[str, object] = field(default_factory=dict)
    data: str = "lesson"
    program: str = "simpletuner"
    batch: int | None = None


PLAIN = MethodRow("plain", "lesson")
CONTROL_ROWS = (
    PLAIN,
    MethodRow("half the rate in single blocks", "methods-rate-single",
              {"lr_by_module": {SINGLE_BLOCKS: 0.5}}),
    MethodRow("a tenth of the rate in the first and the last block", "methods-rate-edges",
              {"lr_by_module": {EDGE_BLOCKS: 0.1}}),
    MethodRow("LoRA+, ratio 4", "methods-loraplus-4", {"loraplus_lr_ratio": 4.0}),
    MethodRow("LoRA+, ratio 16, half the rate", "methods-loraplus-16",
              {"loraplus_lr_ratio": 16.0, "learning_rate": 1.5e-3}),
    MethodRow("rank 4 in single blocks", "methods-rank-single",
              {"lora_rank_by_module": {SINGLE_BLOCKS: 4}}),
    MethodRow("weight CosMap", "methods-weight-cosmap", {"loss_weight_by_sigma": "cosmap"}),
    MethodRow("weight Min-SNR", "methods-weight-min-snr", {"loss_weight_by_sigma": "min_snr"}),
    MethodRow("EMA 0.99, its weights", "methods-ema",
              {"use_ema": True, "ema_decay": 0.99, "ema_validation": "ema_only"}),
    MethodRow(f"mean of the last {AVERAGED_CHECKPOINTS} checkpoints", "methods-averaged",
              program="averaged"),
)  # fmt: skip
BATCH_ROWS = tuple(
    MethodRow(f"batch {batch}, as many images seen", f"methods-batch-{batch}",
              {"train_batch_size": batch}, batch=batch)
    for batch in (1, 4, 16)
)  # fmt: skip
IMAGE_ROWS = tuple(
    MethodRow(f"{count} images of the concept", f"methods-images-{count}", data=f"lesson-{count}")
    for count in (4, 64)
)
CAPTION_ROW = MethodRow(
    "one caption for all of the concept", "methods-constant", data="lesson-constant"
)

# Name of the part, its title, its rows; the first row is what the others are compared with.
METHOD_PARTS: tuple[tuple[str, str, tuple[MethodRow, ...]], ...] = (
    ("control", "rates, ranks, weights and averages", CONTROL_ROWS),
    (
        "batches",
        "batch sizes, with as many images seen",
        (MethodRow("batch 8", "lesson"), *BATCH_ROWS),
    ),
    (
        "images",
        "numbers of images, each set seen as often in all",
        (MethodRow("16 images of the concept", "lesson"), *IMAGE_ROWS),
    ),
    ("captions", "captions of the concept", (MethodRow("varied", "lesson"), CAPTION_ROW)),
    (
        "stored",
        "full rank: how the weights are stored",
        (
            MethodRow("fp32", "full-fp32"),
            MethodRow("bf16, rounded to nearest", "full-bf16"),
            MethodRow("bf16, rounded stochastically", "full-bf16-stochastic"),
        ),
    ),
)
METHOD_PART_NAMES = tuple(name for name, _, _ in METHOD_PARTS)
METHOD_NOTES: Mapping[str, str] = {
    "control": "The same steps for all rows, so that a row with another rate is not one that was tuned. "
    "Seconds a step are medians of runs that shared the machine with other work: do not compare them. "
    + RULE_IN_WORDS,
    "batches": "The rate is the example's for batch 8 in all rows.",
    "images": "Each set of the concept is repeated so that the concept is as large a part of the run.",
    "captions": "The images of other shapes keep their captions.",
    "stored": "The rate is the one that was lowest in held-out loss with fp32, for all rows.",
}


def own_rows() -> list[MethodRow]:
    """Return the rows that are trainings of this table's own, once each."""
    rows = {row.variant: row for _, _, part in METHOD_PARTS for row in part}
    return [row for name, row in rows.items() if name.startswith("methods-")]
