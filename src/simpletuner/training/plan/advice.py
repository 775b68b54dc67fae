"""Which option to change next where memory was too little; known from the options alone."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.schema import RunConfig


def next_down(run: RunConfig) -> str:
    """One sentence: the next setting that needs less memory, mildest first."""
    what = next(_steps(run), "a smaller resolution")
    return f"Next setting down: {what}. `simpletuner plan --fit` shows what would fit"


def _steps(run: RunConfig) -> Iterator[str]:
    model, training, optimizer = run.model, run.training, run.optimizer
    if model.gradient_checkpointing is not True or (model.gradient_checkpointing_interval or 1) > 1:
        yield "gradient_checkpointing = true, for every block"
    if training.train_batch_size > 1:
        samples = training.train_batch_size * training.gradient_accumulation_steps
        yield f"train_batch_size = 1 with gradient_accumulation_steps = {samples}, the same training"
    if model.model_type == "lora":
        finer = {"no_change": "int8", "int8": "nf4", "fp8": "nf4", "int4": "nf4"}
        if model.base_model_precision in finer:
            yield f"base_model_precision = {finer[model.base_model_precision]}"
        if model.musubi_blocks_to_swap == 0 and model.device != "cpu":
            yield "musubi_blocks_to_swap = 0.5, on a GPU with memory of its own"
    elif optimizer.optimizer == "adamw":
        yield "optimizer = adamw_bf16"
    if not model.vae_enable_tiling:
        yield "vae_enable_tiling = true if it was the VAE, else a smaller resolution"
