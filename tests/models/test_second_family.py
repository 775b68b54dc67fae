"""A second family is one class and one registry row: it encodes, trains and exports unchanged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.adapters.lora_file import read_lora_file
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.cache.text_cache import load_text_embedding
from simpletuner.config.load import load_config
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.models import registry
from simpletuner.training import run as engine
from tests.e2e.training_project import make_images, read_losses
from tests.models.pixel_family import NAMES, PixelFamily, PixelText


def train_pixels(root: Path, **options: object) -> Path:
    make_images(root / "images")
    datasets = [
        {
            "id": "images", "type": "local", "dataset_type": "image", "instance_data_dir": "images",
            "caption_strategy": "textfile", "resolution": 80, "resolution_type": "pixel",
        }
    ]  # fmt: skip
    (root / "multidatabackend.json").write_text(json.dumps(datasets))
    config = {
        "output_dir": str(root / "run"), "model_type": "lora", "lora_rank": 2, "learning_rate": 1e-2,
        "mixed_precision": "no", "device": "cpu", "torch_num_threads": 1, "max_train_steps": 2,
        "train_batch_size": 2, "validation_disable": True, "dynamo_backend": "no", **options,
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(config))
    loaded = load_config(config_path=root / "config.json", environ={}, cwd=root)
    run = loaded.config
    model = run.model.model_copy(update={"model_family": "pixels"})
    loaded = dataclasses.replace(loaded, config=run.model_copy(update={"model": model}))
    assert run.data.data_backend_config is not None
    backends = read_dataset_file(Path(run.data.data_backend_config), run.data)
    assert engine.run_training(loaded, backends) == 0
    return root / "run"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FAMILIES, "pixels", PixelFamily)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_family_without_vae_and_with_two_text_tensors_trains(
    tmp_path: Path, checkpointing: bool
) -> None:
    run = train_pixels(tmp_path, gradient_checkpointing=checkpointing, lora_format="comfyui")
    assert sorted(read_losses(run)) == [1, 2]
    lora = read_lora_file(run / "pytorch_lora_weights.safetensors", NAMES)
    assert len(lora.to_deltas()) == 9
    assert any(delta.up.abs().max() > 0 for delta in lora.to_deltas().values())
    fused = load_file(run / "pytorch_lora_weights.comfyui.safetensors")
    assert fused["diffusion_model.stack.0.qv.lora_up.weight"].shape == (72, 4)
    with TensorStore(run / "cache" / "text", "pixel text 1") as texts:
        caption = "another caption 3"
        stored = load_text_embedding(texts, caption)
        (expected,) = PixelText().encode([caption])
        assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
            "words": (4, 10),
            "style": (5,),
        }
        assert all(torch.equal(stored[name], expected[name]) for name in expected)
    with TensorStore(run / "cache" / "vae", "pixel identity 1") as latents:
        rows = latents._index.query("SELECT DISTINCT shape FROM entries")
    assert {tuple(map(int, row[0].split(","))) for row in rows} == {(3, 80, 80), (3, 80, 96)}
