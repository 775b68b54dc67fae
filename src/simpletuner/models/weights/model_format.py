"""The facts that readers of weight files need about an architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from simpletuner.quantization.stored_tensor import StoredTensor

TensorsByKey = Mapping[str, StoredTensor]
# spiece.model alone does not identify its tokenizer class.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class FileKind:
    """A kind of single file. title: such as "a LoRA". component: what it can be used as, or "".

    key_fragments: only files of this kind have one of them in a key. A fragment that begins with a
    line break must be the start of a key; one that ends with a line break, the end of it.
    """

    title: str
    component: str
    key_fragments: tuple[str, ...]


@dataclass(frozen=True)
class ComponentFormat:
    """One component of a model. title: in messages, such as "a T5 encoder".

    weights_stem: name of diffusers' weight files without suffix. key_prefixes: prefixes of its keys
    in all-in-one checkpoints; a file of this component alone has none. rename_keys: applied to the
    tensors of a single file, for example to GGUF names.
    """

    title: str
    weights_stem: str
    key_prefixes: tuple[str, ...] = ()
    rename_keys: Callable[[TensorsByKey], TensorsByKey] = lambda tensors: tensors


@dataclass(frozen=True)
class ModelFormat:
    """Files of one architecture. title: its name in messages, such as "Chroma".

    components: the ones with weights; "transformer" is always among them. file_kinds: in the order
    in which they are tried.
    """

    title: str
    components: Mapping[str, ComponentFormat]
    file_kinds: tuple[FileKind, ...]

    @property
    def folder_names(self) -> tuple[str, ...]:
        """Subfolders of a pipeline's folder."""
        return (*self.components, "tokenizer")
