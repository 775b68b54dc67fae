"""Conditions on the rows of a table: which of them a dataset uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

QUALITY_COLUMN = "quality_assessment"  # a record of numbers, as in SimpleTuner's filter_func
COLLECTION_COLUMN = "collection"


@dataclass(frozen=True)
class RowFilters:
    """Conditions that all must hold. None and empty: no condition.

    collections: allowed values of the column "collection". quality: the least value of each field
    of the record "quality_assessment". minimum_width, minimum_height: of the columns with the
    width and the height.
    """

    collections: tuple[str, ...] = ()
    quality: tuple[tuple[str, float], ...] = ()
    minimum_width: float | None = None
    minimum_height: float | None = None
    width_column: str = "width"
    height_column: str = "height"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        needed = {
            COLLECTION_COLUMN: bool(self.collections),
            QUALITY_COLUMN: bool(self.quality),
            self.width_column: self.minimum_width is not None,
            self.height_column: self.minimum_height is not None,
        }
        return tuple(name for name, is_needed in needed.items() if is_needed)

    def excluding(self, row: Mapping[str, Any]) -> str:
        """Return the condition that the row does not fulfil, or ""."""
        if self.collections and row.get(COLLECTION_COLUMN) not in self.collections:
            return "collection"
        quality = row.get(QUALITY_COLUMN)
        for name, least in self.quality:
            if not isinstance(quality, Mapping) or not _reaches(quality.get(name), least):
                return f"quality_thresholds.{name}"
        if not _reaches(row.get(self.width_column), self.minimum_width):
            return "min_width"
        return "" if _reaches(row.get(self.height_column), self.minimum_height) else "min_height"


def _reaches(cell: Any, least: float | None) -> bool:
    if least is None:
        return True
    try:
        return float(cell) >= least
    except (TypeError, ValueError):
        return False
