"""`simpletuner caption` with a tiny random model of the real classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from simpletuner.cli.caption import command
from simpletuner.cli.captioning import CaptioningRequest, images_to_caption
from simpletuner.config.captioning_models import KNOWN_MODELS, model_for_memory
from simpletuner.errors import ModelError
from tests.cli.tiny_captioner import write_tiny_captioner


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="a model writes the captions")
    folder = tmp_path_factory.mktemp("blip")
    write_tiny_captioner(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        Image.new("RGB", (80, 60), (200, 30, 30)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("by hand")
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    return folder


def run(folder: Path, model: Path, *words: str) -> str:
    arguments = [str(folder), f"--model={model}", "--prompt=a photo", "--max-tokens=4", *words]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_captions_are_written_and_a_person_s_stay(photos: Path, tiny_model: Path) -> None:
    output = run(photos, tiny_model)
    assert (photos / "a.txt").read_text() == "by hand"
    assert set((photos / "b.txt").read_text().split()) == {"disc"}
    assert (photos / "sub" / "c.txt").exists()
    assert "torn.png: left out" in output
    assert "2 captions written" in output
    (photos / "b.txt").unlink()
    assert "1 caption written" in run(photos, tiny_model)  # the same command continues


def test_an_interrupted_replacement_continues(
    photos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    record = tmp_path / "record.jsonl"
    line = json.dumps({"file": "b.png", "caption": "x", "before": None})
    record.write_text(line + '\n{"file": "sub/c')  # the process was killed while it wrote
    output = run(photos, tiny_model, "--overwrite", f"--record={record}")
    assert "by hand" not in (photos / "a.txt").read_text()
    assert not (photos / "b.txt").exists()
    assert "2 captions written" in output
    assert json.loads(record.read_text().splitlines()[-1])["file"] == "sub/c.png"


def test_chosen_files_only(photos: Path) -> None:
    names = lambda wanted, overwrite: [  # noqa: E731
        image.relative_path
        for image in images_to_caption(
            CaptioningRequest(photos, "m", "p", 4, overwrite, wanted, frozenset(), None)
        )
    ]
    assert names(None, False) == ["b.png", "sub/c.png", "torn.png"]
    assert names(("a.png", "b.png"), False) == ["b.png"]
    assert names(("a.png",), True) == ["a.png"]


def test_excluded_images_are_left_alone(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    excluded = tmp_path / "excluded.json"
    excluded.write_text(json.dumps(["b.png", "a.png", "unknown.png"]))
    output = run(photos, tiny_model, f"--exclude={excluded}")
    assert f"images to caption in {photos}: 2\n" in output
    assert "images that are excluded from the dataset and left out: 1\n" in output
    assert not (photos / "b.txt").exists()
    assert (photos / "sub" / "c.txt").exists()


def test_pickled_weights_and_code_of_a_repository_are_refused(
    photos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    import torch

    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        run(photos, pickled)
    remote = tmp_path / "remote"
    shutil.copytree(tiny_model, remote)
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError):
        run(photos, remote)
    assert not (tmp_path / "ran").exists()


def test_the_model_is_chosen_by_memory() -> None:
    assert model_for_memory(None) == KNOWN_MODELS[0]
    assert model_for_memory(10**9) == KNOWN_MODELS[0]
    assert model_for_memory(12 * 10**9).memory_gb == 9.5
    assert model_for_memory(80 * 10**9).memory_gb == 19.0
