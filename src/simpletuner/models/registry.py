"""The architectures there are. A new one is a folder beside this file and a row here."""

from __future__ import annotations

from collections.abc import Callable

from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily


def _chroma() -> ModelFamily:
    from simpletuner.models.chroma.family import Chroma

    return Chroma()


FAMILIES: dict[str, Callable[[], ModelFamily]] = {"chroma": _chroma}


def family(name: str) -> ModelFamily:
    if name not in FAMILIES:
        raise ConfigError(f'model_family "{name}" is not known; there is {", ".join(FAMILIES)}.')
    return FAMILIES[name]()
