"""Section about what is measured to choose a learning rate and to stop: held-out images first."""

from __future__ import annotations

from typing import ClassVar

from simpletuner.config.option import Effect, Not, OptionSection, option

# Read this file as a table: name, type and default; one sentence of help; level, bounds, other
# names, and the relations to other options.

HELD_OUT = {"eval_loss_disable": False}


class TuningOptions(OptionSection):
    """Held-out images, learning-rate search and early stopping."""

    shared_affects: ClassVar[frozenset[Effect]] = frozenset()

    validation_split: float | None = option(
        None,
        "Fraction of the training images to hold out, chosen by their content, without near "
        "duplicates of those that are trained on; null is one in twenty, at most 64, where there "
        "are at least 200 images and no eval dataset; 0 trains on all.",
        level="common",
        ge=0,
        le=0.5,
    )
    validation_fold: str | None = option(
        None,
        "Hold out one part of the training images instead, for cross-validation: 2/5 is the "
        "second of five parts.",
        pattern=r"^\d{1,2}/\d{1,2}$",
    )
    learning_rate_search: bool = option(
        False,
        "Find the learning rate by short trainings first, as simpletuner tune does with its "
        "default rates; learning_rate auto sets it.",
        level="common",
        resume_policy="free",
        needs={"optimizer": Not("prodigy")},
        unmet_errors={"optimizer": "prodigy estimates its learning rate itself; use it with 1.0"},
    )
    num_train_loss_images: int | None = option(
        None,
        "Number of training images whose loss is measured together with the held-out loss, on the "
        "same noise each time: shows overfitting, and which images resist; null is as many as "
        "are held out.",
        unit="images",
        resume_policy="free",
        needs=HELD_OUT,
        ge=0,
    )
    eval_at_start: bool = option(
        True,
        "Measure the held-out loss before the first step too; the changes that are reported are "
        "those since the first measurement.",
        resume_policy="free",
        needs=HELD_OUT,
    )
    early_stopping: bool = option(
        False,
        "End the run when the held-out loss has not improved by more than its standard error for "
        "early_stopping_patience measurements, and export the weights of the best step.",
        level="common",
        resume_policy="free",
        needs=HELD_OUT,
        unmet_errors={"eval_loss_disable": "decides by the held-out loss; eval_loss_disable is on"},
    )
    early_stopping_patience: int = option(
        3,
        "Measurements of the held-out loss without an improvement before early_stopping ends the "
        "run, and before the loss is called flat.",
        unit="measurements",
        resume_policy="free",
        needs=HELD_OUT,
        ge=1,
    )
