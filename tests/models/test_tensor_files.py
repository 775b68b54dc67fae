"""Files written tensor by tensor have the bytes of safetensors' own writer."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.errors import CheckpointError
from simpletuner.models.weights.tensor_files import (
    WholeTensor,
    iter_stored,
    order_in_file,
    send_tensors,
    write_tensors,
)
from simpletuner.quantization.stored_tensor import SAFETENSORS_DTYPES


def tensors_of_every_dtype() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{prefix}{name}": (torch.rand(3, 5, generator=generator) * 5).to(dtype)
        for name, dtype in SAFETENSORS_DTYPES.items()
        for prefix in ("b", "a", 'é"x', "10.", "9.")
    }
    return {
        **tensors, "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4),
        "turned": torch.rand(4, 3).mT,
    }  # fmt: skip


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    save_file({name: one.contiguous() for name, one in tensors.items()}, tmp_path / "theirs")
    write_tensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_all_or_some_rows_are_read(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    write_tensors(tmp_path / "file", tensors)
    read = {stored.name: stored.read() for stored in iter_stored(tmp_path / "file")}
    assert read.keys() == tensors.keys()
    for stored in iter_stored(tmp_path / "file"):
        whole = tensors[stored.name]
        assert torch.equal(read[stored.name].double(), whole.double())
        if len(whole.shape) == 2:
            for rows in (slice(1, 3), slice(0, 0), slice(3, 3)):
                assert torch.equal(stored.read(rows).double(), whole.double()[rows])


def test_parts_are_loaded_one_by_one_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Other ranks send in the same order, whatever the order of their dictionary."""
    loads: list[str] = []
    loaded: list[weakref.ref[Tensor]] = []

    def whole(name: str, tensor: Tensor) -> WholeTensor:
        def load() -> Tensor:
            assert not any(earlier() is not None for earlier in loaded), "two in memory at once"
            loads.append(name)
            copy = tensor.clone()
            loaded.append(weakref.ref(copy))
            return copy

        return WholeTensor(tuple(tensor.shape), tensor.dtype, load)

    tensors = {"b": torch.ones(2), "a": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(2)}
    parts = {name: whole(name, tensor) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "parts", parts)
    write_tensors(tmp_path / "plain", tensors)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "plain").read_bytes()
    send_tensors(dict(reversed(parts.items())))
    assert loads == order_in_file(tensors) * 2 == ["b", "c", "a"] * 2


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(CheckpointError, match="file"):
        list(iter_stored(tmp_path / "file"))
