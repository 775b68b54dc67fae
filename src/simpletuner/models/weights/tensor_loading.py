"""Load stored tensors into a network: checked first, then copied tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from simpletuner.errors import ModelError
from simpletuner.models.weights.weight_header import read_weight_header
from simpletuner.quantization.stored_tensor import StoredTensor

MAX_LISTED_PROBLEMS = 8  # the others are only counted


def read_stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a weight file. Raises ModelError for a damaged or other file."""
    return dict(read_weight_header(path).tensors)


def check_tensors(
    expected: Mapping[str, Tensor], stored: Mapping[str, StoredTensor | Tensor], where: Path
) -> None:
    """Check names, shapes and kinds of dtype; one ModelError lists all problems."""
    problems = [
        f"{name} {tuple(tensor.shape)} is missing"
        for name, tensor in expected.items()
        if name not in stored
    ]
    problems += [
        f"{name} {tuple(tensor.shape)} is unexpected"
        for name, tensor in stored.items()
        if name not in expected
    ]
    for name, tensor in expected.items():
        if name not in stored:
            continue
        if (shape := tuple(stored[name].shape)) != tuple(tensor.shape):
            problems.append(f"{name} is {shape}, expected {tuple(tensor.shape)}")
        elif stored[name].dtype.is_floating_point != tensor.dtype.is_floating_point:
            problems.append(f"{name} is {stored[name].dtype}; only floating point is supported")
    if problems:
        remainder = (
            f"; and {len(problems) - MAX_LISTED_PROBLEMS} more"
            if len(problems) > MAX_LISTED_PROBLEMS
            else ""
        )
        expectation = "of its model" if where.is_file() else "that its config.json describes"
        raise ModelError(
            f"{where} does not hold the weights {expectation}: "
            + "; ".join(problems[:MAX_LISTED_PROBLEMS])
            + remainder
        )


def load_stored_tensors(
    network: nn.Module,
    tensors: Mapping[str, StoredTensor],
    device: torch.device,
    as_views: bool = False,
) -> None:
    """Load tensors one by one into a network on the meta device, in the network's dtypes.

    They are copies, because a file changes when another program rewrites it. as_views: those that
    can be are views of the file, for a network that is copied at once from the host to devices.
    """
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    files = {stored.file for stored in tensors.values()} if as_views else set()
    contents = {file: _map_file(file) for file in files}
    state = {}
    for name, stored in tensors.items():
        view = stored.view_of(contents[stored.file]) if as_views else None
        state[name] = (stored.load() if view is None else view).to(device, dtypes[name])
    network.load_state_dict(state, strict=False, assign=True)


def _map_file(file: Path) -> Tensor:
    """Return the bytes of a file (uint8), read on use and shared by all processes that map it."""
    size = file.stat().st_size
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8, device="cpu")


def load_from_file(network: nn.Module, file: Path, device: torch.device) -> None:
    """Load a file's tensors into a network on the meta device, in the network's dtypes.

    Tensors are views of the file where neither device nor dtype change, so the file may only ever
    be replaced as a whole, never modified.
    """
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    with safe_open(file, framework="pt", device="cpu") as tensors:
        state = {
            name: tensors.get_tensor(name).to(device, dtypes[name])
            for name in tensors.keys()  # noqa: SIM118
        }
    network.load_state_dict(state, strict=False, assign=True)
