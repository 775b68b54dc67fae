"""Find components by the names that users give: folders, single files or hub repositories."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from simpletuner.config.paths import HUB_ID_PATTERN
from simpletuner.errors import ModelError
from simpletuner.events.event_types import Emit
from simpletuner.models.weights.model_format import TOKENIZER_FILES, ModelFormat
from simpletuner.models.weights.single_file import read_component

SINGLE_FILE_SUFFIXES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".sft")


def component_path(component: str, root: Path, model: ModelFormat) -> Path:
    """Return a component's path: a subfolder of a pipeline, the folder itself, or the file."""
    path = root / component if (root / component).is_dir() else root
    check_component(component, path, model)
    return path


def check_component(component: str, path: Path, model: ModelFormat) -> None:
    """Raise ModelError when `path` does not hold this component."""
    if path.is_file() and component in model.components:
        read_component(path, component, model)
    elif not path.is_dir() or (component != "tokenizer" and not (path / "config.json").is_file()):
        raise ModelError(
            f"{path} is not a {component} folder of a diffusers pipeline. A {model.title} folder"
            f" holds: {', '.join(model.folder_names)}."
        )


def find_tokenizer(root: Path) -> Path | None:
    """Return the tokenizer folder next to or inside a text encoder, if there is one."""
    root = root.parent if root.is_file() else root
    for folder in (root / "tokenizer", root):
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    return None


def resolve_root(
    name: str,
    components: list[str],
    revision: str | None,
    variant: str,
    model: ModelFormat,
    check_transformer: Callable[[Path], object],
    emit: Emit,
) -> tuple[Path, str]:
    """Return (folder or file, commit); the commit is empty for local ones.

    name: a path or a hub id, whose `components` are downloaded. check_transformer: see
    download_components.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path.resolve(), ""
    if path.is_file():
        # Not resolved: links in the hub's cache point to file names without a suffix.
        return path.absolute(), ""
    if path.suffix.lower() in SINGLE_FILE_SUFFIXES:
        raise ModelError(f"{name} does not exist; expected a single weight file.")
    if not HUB_ID_PATTERN.fullmatch(name):
        raise ModelError(
            f"{name} is neither an existing file or folder nor a hub repository (owner/name)."
        )
    from simpletuner.models.weights.hub_download import download_components

    return download_components(name, components, revision, variant, model, check_transformer, emit)
