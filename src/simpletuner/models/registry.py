"""The architectures there are. A new one is a folder beside this file and a row here."""

from __future__ import annotations

from collections.abc import Callable

from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily


def _load_chroma_family() -> ModelFamily:
    from simpletuner.models.chroma.family import ChromaFamily

    return ChromaFamily()


FAMILIES: dict[str, Callable[[], ModelFamily]] = {"chroma": _load_chroma_family}


def get_family(name: str) -> ModelFamily:
    if name not in FAMILIES:
        raise ConfigError(f'model_family "{name}" is not known; there is {", ".join(FAMILIES)}.')
    return FAMILIES[name]()
