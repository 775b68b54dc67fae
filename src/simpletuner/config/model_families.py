"""Facts of the model families that must be known without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

DEFAULT_FAMILY = "chroma"
# Bucket sides are multiples of it.
BUCKET_ALIGNMENT_PX: Mapping[str, int] = MappingProxyType({"chroma": 64})
