"""Where the parts of a Chroma lie: the bundled nano, local folders, single files, or a hub repository."""

from __future__ import annotations

from pathlib import Path

import simpletuner.models as models_package
from simpletuner.config.paths import HUB_ID_PATTERN
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ModelError
from simpletuner.events.event_types import Emit, NoticeIssued
from simpletuner.events.sinks import null_emit
from simpletuner.models.chroma import single_file
from simpletuner.models.chroma.hub_download import TOKENIZER_FILES, download_components
from simpletuner.models.family import ModelFiles

NANO = "nano"
FLAVOURS = {
    "base": "lodestones/Chroma1-Base",
    "hd": "lodestones/Chroma1-HD",
    "flash": "lodestones/Chroma1-Flash",
    NANO: NANO,
}
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")
SINGLE_FILE_SUFFIXES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".sft")


def locate_files(options: ModelOptions, emit: Emit = null_emit) -> ModelFiles:
    """Find or download every part. ModelError or DownloadError; no weight is read.

    A part given on its own is taken from its folder, file or repository; the others from the main one, which
    is neither asked for nor downloaded when it has nothing to add. `revision` is the main one's.
    """
    variant, revision = options.variant or "", ""
    places: dict[str, Path] = {}
    for part, name in separate_component_names(options).items():
        wanted = [part, "tokenizer"] if part == "text_encoder" else [part]
        root, _ = resolve_root(name, wanted, None, variant, emit)
        places[part] = component_path(part, root)
        if part == "text_encoder" and (tokenizer := _find_tokenizer(root)):
            places["tokenizer"] = tokenizer
    if needed := [part for part in COMPONENTS if part not in places]:
        origins = main_model_names(options)
        for name in dict.fromkeys(origins[part] for part in needed):
            parts = [part for part in needed if origins[part] == name]
            if name == NANO and not (
                options.pretrained_model_name_or_path == NANO and Path(NANO).is_dir()
            ):
                root, commit = Path(models_package.__path__[0]) / NANO, ""
            else:
                root, commit = resolve_root(name, parts, options.revision, variant, emit)
            revision = revision or commit
            places |= {part: root if root.is_file() else root / part for part in parts}
    for part, place in places.items():
        _check_component(part, place)
    if places["text_encoder"].is_file():
        emit(
            NoticeIssued(
                f"T5 from {places['text_encoder']}, its tokenizer from {places['tokenizer']}"
            )
        )
    name = options.pretrained_model_name_or_path or FLAVOURS[options.model_flavour]
    return ModelFiles(name, revision, **places, variant=variant)


def separate_component_names(options: ModelOptions) -> dict[str, str]:
    """The parts that are given on their own."""
    names = {
        "transformer": options.pretrained_transformer_model_name_or_path,
        "vae": options.pretrained_vae_model_name_or_path,
        "text_encoder": options.pretrained_t5_model_name_or_path,
    }
    return {part: name for part, name in names.items() if name}


def main_model_names(options: ModelOptions) -> dict[str, str]:
    """Where the other parts come from: the main model, and what a single file lacks from the flavour's."""
    main = options.pretrained_model_name_or_path or FLAVOURS[options.model_flavour]
    file = Path(main).expanduser()
    if not file.is_file():
        return dict.fromkeys(COMPONENTS, main)
    held = single_file.components_in_file(file)
    if "transformer" not in held:
        raise ModelError(
            f"{file} is {single_file.COMPONENT_TITLES[held[0]]} alone; the main model brings the transformer."
        )
    return {part: main if part in held else FLAVOURS[options.model_flavour] for part in COMPONENTS}


def component_path(part: str, root: Path) -> Path:
    """Inside a pipeline's folder, the folder itself, or the file."""
    place = root / part if (root / part).is_dir() else root
    _check_component(part, place)
    return place


def _check_component(part: str, place: Path) -> None:
    if place.is_file() and part in single_file.COMPONENT_TITLES:
        single_file.read_component(place, part)
    elif not place.is_dir() or (part != "tokenizer" and not (place / "config.json").is_file()):
        raise ModelError(
            f"{place} is no {part} folder of a diffusers pipeline. A Chroma folder holds {', '.join(COMPONENTS)}."
        )


def _find_tokenizer(root: Path) -> Path | None:
    """A T5 given on its own may bring its tokenizer along, beside it or inside."""
    root = root.parent if root.is_file() else root
    for folder in (root / "tokenizer", root):
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    return None


def resolve_root(
    name: str, parts: list[str], revision: str | None, variant: str, emit: Emit
) -> tuple[Path, str]:
    """(folder or file, commit); the commit is empty for local ones."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve(), ""
    if path.is_file():
        return (
            path.absolute(),
            "",
        )  # not resolved: links in the hub's cache lead to names without an ending
    if path.suffix.lower() in SINGLE_FILE_SUFFIXES:
        raise ModelError(f"{name} does not exist; expected a single file of weights.")
    if not HUB_ID_PATTERN.fullmatch(name):
        raise ModelError(
            f"{name} is neither a file or folder that exists nor a hub repository (owner/name)."
        )
    return download_components(name, parts, revision, variant, emit)
