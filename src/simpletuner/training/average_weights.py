"""The average of the weights of full-rank trainings, written as a transformer folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError, Problem
from simpletuner.events.event_types import Emit
from simpletuner.models.family import as_it_is
from simpletuner.models.registry import get_family
from simpletuner.training import checkpoint
from simpletuner.training.run_folder import replace_folder

WEIGHTS_FILE = "weights.safetensors"


def find_full_weights(source: Path) -> list[Path] | None:
    """Return the files of full-rank weights of a checkpoint, a run or a transformer folder.

    None where the path is something else. Raises ConfigError for a checkpoint whose weights are
    not those to use, and CheckpointError for a damaged one.
    """
    if (source / WEIGHTS_FILE).is_file() and not list(source.glob("pytorch_lora*")):
        checkpoint.verify_checkpoint(source)
        config = checkpoint.read_state(source).get("config")
        optimizer = config.get("optimizer") if isinstance(config, dict) else None
        if optimizer == "adamw_schedulefree":
            raise ConfigError(
                [
                    Problem(
                        str(source),
                        "adamw_schedulefree averages its weights itself; use the transformer "
                        "folder of the run",
                    )
                ]
            )
        return [source / WEIGHTS_FILE]
    for folder in (source / "transformer", source):
        if (folder / "config.json").is_file():
            return sorted(folder.glob("diffusion_pytorch_model*.safetensors")) or None
    return None


def average_transformers(
    parts: Sequence[tuple[Sequence[Path], float]], options: ModelOptions, output: Path, emit: Emit
) -> int:
    """Write the mean of the weights into a new folder; return how many tensors were averaged.

    parts: the files of each source, and its weight; the weights add up to 1. options: of the base,
    which gives the tensors that no training changes. The sum is formed in float64, one tensor after
    the other. Raises ConfigError where the sources do not hold the same tensors.
    """
    files = [_files_by_tensor(paths) for paths, _ in parts]
    weights = [weight for _, weight in parts]
    names = set(files[0])
    for held in files[1:]:
        if set(held) != names:
            raise ConfigError("these sources do not hold the same tensors: other base models?")
    dtype = _read(files[0], sorted(names)[0]).dtype
    family = get_family(options.model_family)
    network = family.load_transformer(
        family.locate_files(options, emit), torch.device("cpu"), dtype, options, emit
    )
    parameters = dict(network.named_parameters())
    unknown = sorted(names - parameters.keys())
    if unknown:
        raise ConfigError(f"the base model has no tensor {unknown[0]}: is it another model?")
    with torch.no_grad():
        for name in sorted(names):
            tensors = [_read(held, name) for held in files]
            if len({tensor.shape for tensor in (*tensors, parameters[name])}) != 1:
                raise ConfigError(f"{name} has different sizes in these sources")
            # Rounded once, at the end; a sum in bf16 would be rounded after every source.
            mean = torch.zeros(tensors[0].shape, dtype=torch.float64)
            for tensor, weight in zip(tensors, weights, strict=True):
                mean.add_(tensor.double(), alpha=weight)
            parameters[name].copy_(mean)
    replace_folder(output, lambda folder: family.save_transformer(network, folder, as_it_is))
    return len(names)


def _files_by_tensor(paths: Sequence[Path]) -> dict[str, Path]:
    held: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, framework="pt", device="cpu") as file:
            held |= dict.fromkeys(file.keys(), path)
    return held


def _read(files: Mapping[str, Path], name: str) -> Tensor:
    with safe_open(files[name], framework="pt", device="cpu") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor
