"""Text encoder, VAE and transformer are loaded one after the other; the earlier ones are gone by
then.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.training import loop
from tests.e2e.training_project import TrainingProject

PARTS = ("load_text_encoder", "load_vae", "load_transformer")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """(what is loaded, what is still alive then), in order; "training" at the first step."""
    log: list[tuple[str, list[str]]] = []
    alive: list[tuple[str, weakref.ref[Any]]] = []

    def living() -> list[str]:
        gc.collect()
        return [name for name, part in alive if part() is not None]

    for name in PARTS:
        original = getattr(ChromaFamily, name)

        def load(
            self: ChromaFamily,
            *given: Any,
            _name: str = name,
            _original: Any = original,
            **named: Any,
        ) -> Any:
            log.append((_name, living()))
            part = _original(self, *given, **named)
            alive.append((_name, weakref.ref(part)))
            return part

        monkeypatch.setattr(ChromaFamily, name, load)
    train_step = loop.train_step

    def first_step(parts: loop.TrainerContext, step: int) -> Any:
        if (
            log
        ):  # the memory plan steps as well, on tensors without contents, before anything is loaded
            log.append(("training", living()))
        return train_step(parts, step)

    monkeypatch.setattr(loop, "train_step", first_step)
    return log


def test_one_after_the_other(watched: list[tuple[str, list[str]]], tmp_path: Path) -> None:
    TrainingProject(tmp_path).train(max_train_steps=1)
    assert watched == [
        ("load_text_encoder", []),
        ("load_vae", []),
        ("load_transformer", []),
        ("training", ["load_transformer"]),
    ]


def test_pictures_hold_a_vae_only_while_they_are_drawn(
    watched: list[tuple[str, list[str]]], tmp_path: Path
) -> None:
    TrainingProject(tmp_path).train(
        max_train_steps=1, validation_disable=False, validation_prompt="a red square",
        validation_resolution="64", validation_num_inference_steps=1,
    )  # fmt: skip
    assert watched[3] == ("load_vae", ["load_transformer"])
    assert ("training", ["load_transformer"]) in watched
