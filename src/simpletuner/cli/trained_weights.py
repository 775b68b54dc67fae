"""Location of the trained weights of a run, and the model options they were trained with."""

from __future__ import annotations

import re
from pathlib import Path

from simpletuner.config.documents import read_document
from simpletuner.config.load import config_from_resolved, load_config
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError, Problem

LORA_FILE = "pytorch_lora_weights.safetensors"


def find_finished_transformer(given: Path) -> Path | None:
    """Return the transformer in the folder of a full-rank run, or None."""
    folder = given.resolve() / "transformer"
    return (
        folder if (folder / "config.json").is_file() and not (given / LORA_FILE).exists() else None
    )


def find_lora_file(given: Path) -> Path:
    """Return the LoRA file of a path: the file itself, or that of a checkpoint or a run.

    A run gives its final LoRA, else that of its newest checkpoint.
    """
    if given.is_file():
        return given
    if not given.is_dir():
        raise ConfigError([Problem(str(given), "no such file or folder")])
    checkpoints = [
        (int(match[1]), folder)
        for folder in given.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    ]
    for folder in (given, *(folder for _, folder in sorted(checkpoints, reverse=True))):
        if (folder / LORA_FILE).is_file():
            return folder / LORA_FILE
    files = sorted(given.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    problem = (
        f"holds {len(files)} .safetensors files; name one of them"
        if files
        else f"holds no {LORA_FILE}; for a full transformer use "
        "--pretrained_transformer_model_name_or_path"
    )
    raise ConfigError([Problem(str(given), problem)])


def resolve_model_options(
    config: Path | None, runs: list[Path], flags: dict[str, str]
) -> ModelOptions:
    """Return the model options: flags over --config, else over the run that wrote the weights.

    Without either, the configuration found in the working directory is used.
    """
    for run in runs if config is None else ():
        if (run / "events.jsonl").is_file() and (run / "config.json").is_file():
            known = read_document(run / "config.json", str(run / "config.json")).value
            if "model_flavour" in flags:  # the run's own base would hide the flavour asked for
                known = {
                    name: value
                    for name, value in known.items()
                    if not name.startswith("pretrained_")
                }
            return config_from_resolved({**known, **flags}).model
    return load_config(tuple(flags.items()), config, needs_data=False).config.model
