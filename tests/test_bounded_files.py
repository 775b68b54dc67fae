"""Files of other people: pipes and devices do not hang, large ones do not fill the memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.adapters.safetensors_reader import read_keys_and_metadata
from simpletuner.bounded_files import open_regular_file, read_bounded_bytes, read_bounded_text
from simpletuner.config.documents import read_document
from simpletuner.config.lycoris_config import read_lycoris_file
from simpletuner.config.schema import DataOptions
from simpletuner.data.captions import MAX_CAPTION_BYTES, read_captions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.pixels import read_image_header
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sources import LocalFile
from simpletuner.errors import ConfigError, ModelError
from simpletuner.events.event_log import read_events
from simpletuner.events.webhook_sink import parse_webhook_config
from simpletuner.models.weights.file_fingerprint import fingerprint_file
from simpletuner.models.weights.model_folder import read_json
from simpletuner.models.weights.weight_header import read_weight_header
from simpletuner.training.checkpoint import find_damage

READERS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "config": (lambda path: read_document(path, "config.json"), ConfigError),
    "lycoris": (lambda path: read_lycoris_file(str(path)), ConfigError),
    "webhook": (lambda path: parse_webhook_config(str(path)), ConfigError),
    "model json": (read_json, ModelError),
    "weights": (read_weight_header, ModelError),
    "lora": (read_keys_and_metadata, ModelError),
    "fingerprint": (fingerprint_file, OSError),
    "events": (lambda path: list(read_events(path)), OSError),
    "image": (lambda path: read_image_header(LocalFile(path), 100), UnusableFile),
    "plain": (open_regular_file, OSError),
}


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", READERS)
def test_only_regular_files_are_opened(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "x.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    read, error = READERS[name]
    with pytest.raises(error):
        read(path)


def test_a_pipe_in_a_checkpoint_is_damage(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    assert "cannot be read" in (find_damage(tmp_path) or "")


def test_the_limit_is_exact_and_named(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a" * 100)
    assert read_bounded_text(path, 100) == "a" * 100
    with pytest.raises(OSError, match="is larger than 99 bytes") as caught:
        read_bounded_bytes(path, 99)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_a_caption_is_a_regular_file_of_bounded_size(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"a" * (MAX_CAPTION_BYTES + 1))
    dataset = DatasetConfig("d", "image", tmp_path)
    with pytest.raises(
        UnusableFile, match=r"x\.txt: is (not a regular file|larger than)"
    ) as caught:
        read_captions(dataset, LocalFile(tmp_path / "x.png"), LocalFile(path), DataOptions())
    assert caught.value.reason == "caption_unreadable"
