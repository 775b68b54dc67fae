"""The known architectures. A new one is a folder in this package and a row here."""

from __future__ import annotations

from collections.abc import Callable

from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily


def _load_chroma_family() -> ModelFamily:
    from simpletuner.models.chroma.family import ChromaFamily

    return ChromaFamily()


FAMILIES: dict[str, Callable[[], ModelFamily]] = {"chroma": _load_chroma_family}


def get_family(name: str) -> ModelFamily:
    """Return the family of that name. Raises ConfigError with the known names."""
    if name not in FAMILIES:
        raise ConfigError(
            f'model_family "{name}" is unknown; the known families are: {", ".join(FAMILIES)}.'
        )
    return FAMILIES[name]()
