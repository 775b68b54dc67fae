"""What is measured: trainings up to their seed (variants), their cells, and the tables that compare
them.

A variant may stand in several tables: the example's lesson is the reference of three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.nano import methods, preservation
from benchmarks.nano.exposure import EXPOSURE_PROMPTS, EXPOSURE_ROWS, SAMPLING_STEPS

PRECISIONS = ("int8", "int4", "nf4", "fp8")
DENSITIES = ("quadratic", "parabola", "quadratic-literal", "uniform", "logit-normal")
SEEDS = (1, 2, 3)
TRIAL_SEED = 10  # full rank's learning rate is chosen with it and compared with the others
FROZEN_LEARNING_RATE = (
    1e-12  # a learning rate at which no weight moves by as much as its last digit
)
REFERENCE_VARIANT = "lesson"
# The preset's blocks 7 and 20 of 38, at the same depth of chroma-nano's 8.
TINY_TARGETS = ["single_transformer_blocks.1.proj_out", "single_transformer_blocks.4.proj_out"]
PADDED_ROWS = 512


@dataclass(frozen=True)
class ExperimentSize:
    """How much of everything. pictures: drawn to train from scratch; unseen: held-out pictures,
    drawn likewise; prompts: per score; sigmas: noise levels at which each unseen picture is
    measured; fit_steps: of make_transformer.py."""

    lesson_steps: int
    scratch_steps: int
    still_steps: int
    lesson_batch: int
    scratch_batch: int
    pictures: int
    unseen: int
    prompts: int
    sampling_steps: int
    sigmas: int
    fit_steps: int
    rates: tuple[float, ...]


FULL_EXPERIMENT = ExperimentSize(
    250, 180, 160, 8, 24, 2000, 32, 32, 20, 10, 2000, (1e-4, 3e-4, 1e-3)
)
SMOKE_TEST = ExperimentSize(2, 2, 2, 2, 2, 4, 2, 2, 2, 2, 2, (1e-4,))


@dataclass(frozen=True)
class Variant:
    """A training up to its seed.

    options: what differs from the data's own ("lesson": the example's, "shapes": from scratch).
    program: a key of PROGRAMS. cache: name of the shared cache. learning_rate_trials: variants, of
    which the one with the lowest held-out loss lends its learning rate. init_lora_variant: the
    variant whose LoRA this one starts from, same seed. seeds: those it has; empty means all that
    are asked for.
    """

    name: str
    data: str
    options: Mapping[str, object] = field(default_factory=dict)
    program: str = "simpletuner"
    cache: str = "trimmed"
    learning_rate_trials: tuple[str, ...] = ()
    init_lora_variant: str | None = None
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One training. needs: names of cells that must be finished before it can begin."""

    variant: Variant
    seed: int
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return cell_name(self.variant.name, self.seed)


@dataclass(frozen=True)
class TableRow:
    label: str
    variant: str


@dataclass(frozen=True)
class TablePart:
    """Rows that are compared with each other; the first is what the others are compared with."""

    name: str
    title: str
    rows: tuple[TableRow, ...]


def cell_name(variant: str, seed: int) -> str:
    return f"{variant}/seed-{seed}"


def build_variants(size: ExperimentSize) -> dict[str, Variant]:
    """Every training, the most decisive tables' first."""
    made = [
        Variant(
            "base",
            "lesson",
            {**_frozen_weights_options(1), "evaluation_type": "shapes,zorbo"},
            seeds=(SEEDS[0],),
        ),
        Variant(REFERENCE_VARIANT, "lesson"),
        *(
            Variant(f"lesson-{name}", "lesson", {"chroma_sigma_density": name})
            for name in DENSITIES
            if name != "quadratic"
        ),
        *(Variant(f"on-{name}", "lesson", {"base_model_precision": name}) for name in PRECISIONS),
        Variant(
            "still-stratified", "lesson", _sigma_variance_options(size, stratified_sigmas=True)
        ),
        Variant(
            "still-independent", "lesson", _sigma_variance_options(size, stratified_sigmas=False)
        ),
        *_learning_rate_trials(size),
        Variant("rank-4", "lesson", {"lora_rank": 4}),
        Variant("rank-64", "lesson", {"lora_rank": 64}),
        Variant("all+ffs", "lesson", {"flux_lora_target": "all+ffs"}),
        Variant("context", "lesson", {"flux_lora_target": "context"}),
        Variant("tiny", "lesson", {"lora_target_modules": TINY_TARGETS}),
        *_full_rank_variants(size),
        Variant(
            "shapes",
            "shapes",
            {**_frozen_weights_options(1), "evaluation_type": "none"},
            "world",
            seeds=(SEEDS[0],),
        ),
        *(
            Variant(f"scratch-{name}", "shapes", {"chroma_sigma_density": name})
            for name in DENSITIES
        ),
        *_exposure_variants(size),
        *_method_variants(size),
        *_preservation_variants(),
        Variant("padded", "lesson", {"evaluation_type": "zorbo"}, "padded", "padded"),
        Variant(
            "padded-used-trimmed", "lesson", _frozen_weights_options(1), init_lora_variant="padded"
        ),
    ]
    return {one.name: one for one in made}


def _frozen_weights_options(steps: int) -> dict[str, object]:
    return {
        "max_train_steps": steps,
        "learning_rate": FROZEN_LEARNING_RATE,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
    }


def _sigma_variance_options(size: ExperimentSize, stratified_sigmas: bool) -> dict[str, object]:
    """Fixed weights: what varies from step to step is what was drawn."""
    return {
        **_frozen_weights_options(size.still_steps),
        "stratified_sigmas": stratified_sigmas,
        "evaluation_type": "none",
        "num_eval_images": 1,
    }


FULL_RANK_OPTIONS = {"model_type": "full", "optimizer": "adamw"}


def _learning_rate_trials(size: ExperimentSize) -> Iterator[Variant]:
    for rate in size.rates:
        options = {**FULL_RANK_OPTIONS, "base_model_default_dtype": "fp32", "learning_rate": rate}
        yield Variant(
            f"trial-{rate:g}", "lesson", {**options, "evaluation_type": "none"}, seeds=(TRIAL_SEED,)
        )


def _full_rank_variants(size: ExperimentSize) -> Iterator[Variant]:
    """fp32 master weights; bf16 weights rounded to nearest; bf16 weights rounded stochastically."""
    kinds: dict[str, dict[str, object]] = {
        "full-fp32": {"base_model_default_dtype": "fp32"},
        "full-bf16": {"base_model_default_dtype": "bf16"},
        "full-bf16-stochastic": {"base_model_default_dtype": "bf16", "optimizer": "adamw_bf16"},
    }
    for name, options in kinds.items():
        trials = tuple(f"trial-{rate:g}" for rate in size.rates)
        yield Variant(name, "lesson", {**FULL_RANK_OPTIONS, **options}, learning_rate_trials=trials)


def _exposure_variants(size: ExperimentSize) -> Iterator[Variant]:
    """Train on rollouts or MixFlow, then score every LoRA at several numbers of sampling steps."""
    for _, name, options in EXPOSURE_ROWS:
        if name != REFERENCE_VARIANT:
            yield Variant(name, "lesson", {**options, "evaluation_type": "none"})
    for steps in SAMPLING_STEPS:
        scored = {
            **_frozen_weights_options(1),
            "evaluation_type": "shapes,zorbo",
            "evaluation_prompts": min(EXPOSURE_PROMPTS, 2 * size.prompts),
            "validation_num_inference_steps": min(steps, size.sampling_steps),
            "num_eval_images": 1,
        }
        yield Variant(f"at-{steps}-base", "lesson", scored, seeds=(SEEDS[0],))
        for _, name, _ in EXPOSURE_ROWS:
            yield Variant(f"at-{steps}-{name}", "lesson", scored, init_lora_variant=name)


def _method_variants(size: ExperimentSize) -> Iterator[Variant]:
    """The rows of `methods`; with another batch size as many images are seen."""
    for row in methods.own_rows():
        options = dict(row.options)
        if row.batch is not None:
            steps = size.lesson_steps * size.lesson_batch // row.batch
            options["max_train_steps"] = max(2, steps)
        yield Variant(row.variant, row.data, options, row.program)


def _preservation_variants() -> Iterator[Variant]:
    for row in preservation.ROWS:
        yield Variant(row.variant, row.data, row.options)


TABLES: dict[str, tuple[TablePart, ...]] = {
    "density": (
        TablePart(
            "lesson",
            "the example's lesson (LoRA, rank 16)",
            tuple(
                TableRow(name, REFERENCE_VARIANT if name == "quadratic" else f"lesson-{name}")
                for name in DENSITIES
            ),
        ),
        TablePart(
            "scratch",
            "from scratch, short (full rank)",
            tuple(TableRow(name, f"scratch-{name}") for name in DENSITIES),
        ),
    ),
    "stratified": (
        TablePart(
            "still",
            "the example's first step again and again, at fixed weights",
            (TableRow("independent", "still-independent"), TableRow("stratified", "still-stratified")),
        ),
    ),
    "lora": (
        TablePart(
            "kinds",
            "what of the network is trained, and how",
            (
                TableRow("LoRA all, rank 16", REFERENCE_VARIANT),
                TableRow("LoRA all, rank 4", "rank-4"),
                TableRow("LoRA all, rank 64", "rank-64"),
                TableRow("LoRA all+ffs, rank 16", "all+ffs"),
                TableRow("LoRA context, rank 16", "context"),
                TableRow("LoRA tiny, rank 16", "tiny"),
                TableRow("full rank, fp32 master", "full-fp32"),
                TableRow("full rank, bf16 to nearest", "full-bf16"),
                TableRow("full rank, bf16 stochastic", "full-bf16-stochastic"),
            ),
        ),
    ),
    "precision": (
        TablePart(
            "bases",
            "the example's lesson on a quantised base",
            (TableRow("bf16", REFERENCE_VARIANT), *(TableRow(name, f"on-{name}") for name in PRECISIONS)),
        ),
    ),
    "exposure": (
        TablePart(
            "exposure",
            "training on the network's own inputs (rollout), or on noisier ones (MixFlow)",
            tuple(TableRow(label, name) for label, name, _ in EXPOSURE_ROWS),
        ),
        *(
            TablePart(
                f"at-{steps}",
                f"the same LoRAs at {steps} sampling steps",
                (
                    *(TableRow(label, f"at-{steps}-{name}") for label, name, _ in EXPOSURE_ROWS),
                    TableRow("base without a LoRA", f"at-{steps}-base"),
                ),
            )
            for steps in SAMPLING_STEPS
        ),
    ),
    "methods": tuple(
        TablePart(name, title, tuple(TableRow(row.label, row.variant) for row in rows))
        for name, title, rows in methods.METHOD_PARTS
    ),
    "preservation": (
        TablePart(
            "preservation",
            preservation.TITLE,
            tuple(TableRow(row.label, row.variant) for row in preservation.ROWS),
        ),
    ),
    "text": (
        TablePart(
            "rows",
            "text rows in training, and in use",
            (
                TableRow("trimmed, used trimmed", REFERENCE_VARIANT),
                TableRow("512 padded, used trimmed", "padded-used-trimmed"),
                TableRow("512 padded, used padded", "padded"),
            ),
        ),
    ),
}  # fmt: skip


def list_cells(size: ExperimentSize, seeds: Sequence[int], only: Sequence[str] = ()) -> list[Cell]:
    """In the order of work: variant groups as they are listed, within a group one seed after the
    other.
    """
    known = build_variants(size)
    wanted = _required_variants(known, only or tuple(TABLES))
    listed = []
    for group in VARIANT_GROUPS:
        members = [
            one for one in known.values() if one.name in wanted and one.name.startswith(group)
        ]
        for seed in (*seeds, TRIAL_SEED):
            for one in members:
                own = one.seeds or tuple(seeds)
                if seed in own:
                    listed.append(Cell(one, seed, tuple(_required_cells(one, seed))))
    return listed


# What is compared is trained together, seed by seed, so that an early end leaves whole
# comparisons.
VARIANT_GROUPS = (
    ("base",), ("lesson",), ("rollout", "mixflow", "at-"), ("on-",), ("still",), ("trial",),
    ("methods",), ("preserve",),
    ("rank", "all", "context", "tiny"), ("full",),
    ("shapes",), ("scratch", "padded"),
)  # fmt: skip


def _required_variants(known: Mapping[str, Variant], tables: Sequence[str]) -> set[str]:
    """The tables' variants and what these need, the untouched base included."""
    wanted = {"base"} | {
        row.variant for name in tables for part in TABLES[name] for row in part.rows
    }
    for name in tuple(wanted):
        one = known[name]
        wanted |= {
            *one.learning_rate_trials,
            *([one.init_lora_variant] if one.init_lora_variant else []),
        }
        wanted |= {"shapes"} if one.data == "shapes" else set()
    return wanted


def _required_cells(one: Variant, seed: int) -> Iterator[str]:
    yield from (cell_name(name, TRIAL_SEED) for name in one.learning_rate_trials)
    if one.init_lora_variant is not None:
        yield cell_name(one.init_lora_variant, seed)
    if one.data == "shapes" and one.program != "world":
        yield cell_name("shapes", SEEDS[0])
