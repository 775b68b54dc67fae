"""Whole runs on a tiny checkpoint: what every end-to-end test starts from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from simpletuner.config.load import LoadedConfig, load_config
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.errors import SimpleTunerError
from simpletuner.events import event_log
from simpletuner.events.event_types import Event, StepCompleted
from simpletuner.training import run as engine
from tests.models.tiny_checkpoint import make_checkpoint


def make_images(folder: Path, count: int = 6, side: int = 64, first: int = 0) -> None:
    """Coloured noise, one caption file each; caption lengths differ."""
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(
            0, 255, (side, side + 16 * (number % 2), 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(folder / f"picture-{number}.png")
        words = " ".join(["a red square"] * (1 + number % 3))
        (folder / f"picture-{number}.txt").write_text(f"{words}\nanother caption {number}")


class TrainingProject:
    """A folder with a checkpoint, pictures, a dataset file and a config; `train()` runs it here."""

    def __init__(self, root: Path, **options: object) -> None:
        self.root = root
        self.base_model_dir = root / "base"
        make_checkpoint(self.base_model_dir)
        make_images(root / "pictures")
        make_images(root / "held-out", count=3, first=10)
        self.write_datasets()
        self.options: dict[str, object] = {
            "model_type": "lora", "model_family": "chroma", "pretrained_model_name_or_path": str(self.base_model_dir),  # noqa: E501
            "output_dir": str(root / "run"), "lora_rank": 2, "lora_dropout": 0.1, "learning_rate": 1e-2,
            "mixed_precision": "no", "device": "cpu", "torch_num_threads": 1, "max_train_steps": 6,
            "gradient_accumulation_steps": 2, "train_batch_size": 2, "caption_dropout_probability": 0.2,
            "checkpoint_step_interval": 2, "use_ema": True, "ema_decay": 0.9, "lr_scheduler": "cosine",
            "lr_warmup_steps": 1, "validation_disable": True, "resolution": 64,
            "eval_sigma_count": 2,  # of the usual 8: most forward passes of a run would be of this loss
            **options,
        }  # fmt: skip

    def write_datasets(self, **fields: object) -> None:
        common = {
            "type": "local",
            "caption_strategy": "textfile",
            "resolution": 64,
            "resolution_type": "pixel_area",
        }
        sets = [
            {
                "id": "photos",
                "dataset_type": "image",
                "instance_data_dir": "pictures",
                **common,
                **fields,
            },
            {"id": "held", "dataset_type": "eval", "instance_data_dir": "held-out", **common},
        ]
        (self.root / "multidatabackend.json").write_text(json.dumps(sets))

    def load_config(self, **options: object) -> LoadedConfig:
        config = self.root / "config.json"
        # In one piece: the processes of a run write and read it at the same time.
        written = self.root / f"config-{os.getpid()}.json"
        written.write_text(json.dumps({**self.options, **options}))
        os.replace(written, config)
        return load_config(config_path=config, environ={}, cwd=self.root)

    def train(self, within: str | None = None, **options: object) -> Path:
        loaded = self.load_config(**options)
        assert loaded.config.data.data_backend_config is not None
        backends = read_dataset_file(
            Path(loaded.config.data.data_backend_config), loaded.config.data
        )
        assert engine.run_training(loaded, backends, within) == 0
        return Path(loaded.config.training.output_dir)

    def train_and_expect_error(self, **options: object) -> SimpleTunerError:
        try:
            self.train(**options)
        except SimpleTunerError as error:
            return error
        raise AssertionError("the run went through")


def read_events(run_dir: Path) -> list[Event]:
    return [record.event for record in event_log.read_events(run_dir / "events.jsonl")]


def read_losses(run_dir: Path) -> dict[int, tuple[float, float, float]]:
    """(loss, gradient norm, learning rate) by step; a step done twice counts once, as it was done
    last.
    """
    steps = [event for event in read_events(run_dir) if isinstance(event, StepCompleted)]
    return {event.step: (event.loss, event.grad_norm, event.learning_rate) for event in steps}


def read_checkpoint_files(
    checkpoint: Path, names: Sequence[str] = ("weights", "optimizer", "ema")
) -> dict[str, bytes]:
    return {name: (checkpoint / f"{name}.safetensors").read_bytes() for name in names}


def make_stop_flag(step: int) -> Callable[[object], bool]:
    """A stop flag for monkeypatching: asks to leave after `step`."""
    return lambda loop_step: loop_step == step
