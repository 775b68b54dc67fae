"""Locate Chroma's components: the bundled nano model, local folders, single files or the hub."""

from __future__ import annotations

import os
from pathlib import Path

import simpletuner.models as models_package
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ModelError
from simpletuner.events.event_types import Emit, NoticeIssued
from simpletuner.events.sinks import null_emit
from simpletuner.models.chroma.model_format import CHROMA_FORMAT
from simpletuner.models.chroma.weights import read_transformer_config
from simpletuner.models.family import ModelFiles
from simpletuner.models.weights.locations import (
    check_component,
    component_path,
    find_tokenizer,
    resolve_root,
)
from simpletuner.models.weights.single_file import components_in_file

NANO = "nano"
FLAVOURS = {
    "base": "lodestones/Chroma1-Base",
    "hd": "lodestones/Chroma1-HD",
    "flash": "lodestones/Chroma1-Flash",
    NANO: NANO,
}
COMPONENTS = CHROMA_FORMAT.folder_names


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
        root, _ = locate_root(name, components_wanted, None, variant, emit)
        paths[component] = component_path(component, root, CHROMA_FORMAT)
        if component == "text_encoder" and (tokenizer := find_tokenizer(root)):
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
                root, commit = locate_root(
                    name, components_of_name, options.revision, variant, emit
                )
            revision = revision or commit
            paths |= {
                component: root if root.is_file() else root / component
                for component in components_of_name
            }
    for component, path in paths.items():
        check_component(component, path, CHROMA_FORMAT)
    if paths["text_encoder"].is_file():
        emit(
            NoticeIssued(
                f"T5 is loaded from {paths['text_encoder']}, its tokenizer from"
                f" {paths['tokenizer']}"
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
    file = Path(os.path.expanduser(main))
    if not file.is_file():
        return dict.fromkeys(COMPONENTS, main)
    available = components_in_file(file, CHROMA_FORMAT)
    if "transformer" not in available:
        raise ModelError(
            f"{file} holds only {CHROMA_FORMAT.components[available[0]].title}, but the main"
            " model must"
            " hold the transformer. Set pretrained_model_name_or_path to one that does."
        )
    return {
        component: main if component in available else FLAVOURS[options.model_flavour]
        for component in COMPONENTS
    }


def locate_root(
    name: str, components: list[str], revision: str | None, variant: str, emit: Emit
) -> tuple[Path, str]:
    """Return (folder or file, commit) of Chroma's components at a path or in a repository."""
    return resolve_root(
        name, components, revision, variant, CHROMA_FORMAT, read_transformer_config, emit
    )
