"""Locate Chroma's components: the bundled nano model, local folders, single files or the hub."""

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
    """Find or download every component without loading weights.

    A component that has its own option comes from that folder, file or repository; the others come
    from the main model, which is not downloaded when it is not needed. `revision` applies to the
    main model. Raises ModelError or DownloadError.
    """
    variant = options.variant or ""
    revision = ""
    paths: dict[str, Path] = {}
    for component, name in separate_component_names(options).items():
        components_wanted = [component, "tokenizer"] if component == "text_encoder" else [component]
        root, _ = resolve_root(name, components_wanted, None, variant, emit)
        paths[component] = component_path(component, root)
        if component == "text_encoder" and (tokenizer := _find_tokenizer(root)):
            paths["tokenizer"] = tokenizer
    if remaining := [component for component in COMPONENTS if component not in paths]:
        origins = main_model_names(options)
        for name in dict.fromkeys(origins[component] for component in remaining):
            components_of_name = [
                component for component in remaining if origins[component] == name
            ]
            if name == NANO and not (
                options.pretrained_model_name_or_path == NANO and Path(NANO).is_dir()
            ):
                root, commit = Path(models_package.__path__[0]) / NANO, ""
            else:
                root, commit = resolve_root(
                    name, components_of_name, options.revision, variant, emit
                )
            revision = revision or commit
            paths |= {
                component: root if root.is_file() else root / component
                for component in components_of_name
            }
    for component, path in paths.items():
        _check_component(component, path)
    if paths["text_encoder"].is_file():
        emit(
            NoticeIssued(
                f"T5 is loaded from {paths['text_encoder']}, its tokenizer from {paths['tokenizer']}"
            )
        )
    name = options.pretrained_model_name_or_path or FLAVOURS[options.model_flavour]
    return ModelFiles(name, revision, **paths, variant=variant)


def separate_component_names(options: ModelOptions) -> dict[str, str]:
    """Return the components that have their own option, with the option's value."""
    names = {
        "transformer": options.pretrained_transformer_model_name_or_path,
        "vae": options.pretrained_vae_model_name_or_path,
        "text_encoder": options.pretrained_t5_model_name_or_path,
    }
    return {part: name for part, name in names.items() if name}


def main_model_names(options: ModelOptions) -> dict[str, str]:
    """Return where each other component comes from.

    That is the main model; components that a single file lacks come from the flavour's repository.
    """
    main = options.pretrained_model_name_or_path or FLAVOURS[options.model_flavour]
    file = Path(main).expanduser()
    if not file.is_file():
        return dict.fromkeys(COMPONENTS, main)
    available = single_file.components_in_file(file)
    if "transformer" not in available:
        raise ModelError(
            f"{file} holds only {single_file.COMPONENT_TITLES[available[0]]}, but the main model must"
            " hold the transformer. Set pretrained_model_name_or_path to one that does."
        )
    return {
        component: main if component in available else FLAVOURS[options.model_flavour]
        for component in COMPONENTS
    }


def component_path(component: str, root: Path) -> Path:
    """Return a component's path: a subfolder of a pipeline, the folder itself, or the file."""
    path = root / component if (root / component).is_dir() else root
    _check_component(component, path)
    return path


def _check_component(component: str, path: Path) -> None:
    if path.is_file() and component in single_file.COMPONENT_TITLES:
        single_file.read_component(path, component)
    elif not path.is_dir() or (component != "tokenizer" and not (path / "config.json").is_file()):
        raise ModelError(
            f"{path} is not a {component} folder of a diffusers pipeline. A Chroma folder holds:"
            f" {', '.join(COMPONENTS)}."
        )


def _find_tokenizer(root: Path) -> Path | None:
    """Return the tokenizer folder next to or inside a separately given T5, if there is one."""
    root = root.parent if root.is_file() else root
    for folder in (root / "tokenizer", root):
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    return None


def resolve_root(
    name: str, components: list[str], revision: str | None, variant: str, emit: Emit
) -> tuple[Path, str]:
    """Return (folder or file, commit); the commit is empty for local ones."""
    path = Path(name).expanduser()
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
    return download_components(name, components, revision, variant, emit)
