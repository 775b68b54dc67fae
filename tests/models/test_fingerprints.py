from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from simpletuner.config.schema import ModelOptions
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.family import ModelFiles
from simpletuner.models.weights.file_fingerprint import fingerprint_file
from tests.quick import assert_quick

CPU = torch.device("cpu")


def names(source: ModelFiles, options: ModelOptions, **changes: object) -> tuple[str, str]:
    changed = options.model_copy(update=changes)
    return ChromaFamily().text_fingerprint(source, changed), ChromaFamily().vae_fingerprint(
        source, changed
    )


@pytest.mark.parametrize(
    "change",
    [{"flux_t5_padding": "zero"}, {"tokenizer_max_length": 100}, {"mixed_precision": "bf16"}],
)
def test_text_follows_what_changes_rows(
    source: ModelFiles, options: ModelOptions, change: dict[str, object]
) -> None:
    (text, vae), (other_text, other_vae) = names(source, options), names(source, options, **change)
    assert text != other_text
    assert vae == other_vae


@pytest.mark.parametrize("change", [{"vae_dtype": "bf16"}, {"vae_enable_tiling": True}])
def test_vae_follows_what_changes_moments(
    source: ModelFiles, options: ModelOptions, change: dict[str, object]
) -> None:
    (text, vae), (other_text, other_vae) = names(source, options), names(source, options, **change)
    assert vae != other_vae
    assert text == other_text


def test_what_changes_nothing_is_left_out(source: ModelFiles, options: ModelOptions) -> None:
    same = names(
        source, options, caption_overlong="error", vae_enable_slicing=True, tokenizer_max_length=512
    )
    assert same == names(source, options)


def test_contents_count_and_places_do_not(
    options: ModelOptions, checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere"))
    moved = options.model_copy(update={"pretrained_model_name_or_path": str(folder)})
    before = names(ChromaFamily().locate_files(options), options)
    assert names(ChromaFamily().locate_files(moved), moved) == before
    for path in (
        folder / "vae" / "diffusion_pytorch_model.safetensors",
        folder / "tokenizer" / "tokenizer.json",
    ):
        with path.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"!")
    text, vae = names(ChromaFamily().locate_files(moved), moved)
    assert text != before[0]
    assert vae != before[1]


def test_ten_gigabytes_take_no_time(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(10_000_000_000)  # sparse
    empty = fingerprint_file(path)
    assert_quick(lambda: fingerprint_file(path), 0.5)
    with path.open("r+b") as file:
        file.seek(10_000_000_000 - 10)
        file.write(b"x")
    assert fingerprint_file(path) != empty
