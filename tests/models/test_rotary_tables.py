"""Rotary tables that are kept: those that would be computed."""

from __future__ import annotations

import pytest
import torch

from simpletuner.models.chroma import embeddings
from simpletuner.models.chroma.embeddings import RotaryTables, rotary_table

AXES = (4, 6, 6)
CPU = torch.device("cpu")


def test_a_kept_table_serves_every_text_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "TEXT_ROWS", 8)
    computed = []
    compute = rotary_table
    monkeypatch.setattr(
        embeddings, "rotary_table", lambda *args: computed.append(args) or compute(*args)
    )
    tables = RotaryTables(AXES)
    for text, rows, columns in [(3, 4, 6), (8, 4, 6), (1, 6, 4), (5, 4, 6), (11, 4, 6), (9, 4, 6)]:
        table = tables(text, rows, columns, CPU)
        assert torch.equal(table, compute(AXES, text, rows, columns))
    assert len(computed) == 3, "one for each grid, and one for a text that is longer than usual"


def test_only_the_latest_grids_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "KEPT_TABLES", 2)
    tables = RotaryTables(AXES)
    for rows in (2, 3, 2, 4):
        tables(1, rows, 2, CPU)
    assert [rows for rows, _, _ in tables._tables] == [2, 4]
