"""The rows of the table of methods and its verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.nano import experiment_inputs, methods
from benchmarks.nano.experiments import FULL_EXPERIMENT, TABLES, build_variants


def test_rows_of_another_batch_size_see_as_many_images() -> None:
    variants = build_variants(FULL_EXPERIMENT)
    seen = FULL_EXPERIMENT.lesson_steps * FULL_EXPERIMENT.lesson_batch
    for row in methods.BATCH_ROWS:
        options = variants[row.variant].options
        assert int(str(options["max_train_steps"])) * (row.batch or 0) == pytest.approx(
            seen, abs=15
        )


def test_all_sets_of_the_concept_are_measured_on_the_same_images_and_noise(tmp_path: Path) -> None:
    """The noise of a held-out image follows from its dataset's name and its own."""
    inputs = experiment_inputs.ExperimentInputs(tmp_path)
    inputs.make_lesson_datasets(FULL_EXPERIMENT, lambda arguments: None)
    rows = (*methods.IMAGE_ROWS, methods.CAPTION_ROW)
    files = [inputs.dataset_file(data) for data in ("lesson", *(row.data for row in rows))]
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    assert all(datasets[-1] == read[0][-1] for datasets in read)
    assert all(datasets[0] != read[0][0] for datasets in read[1:])


def test_every_part_compares_with_a_row_that_other_tables_have_too() -> None:
    for part in TABLES["methods"]:
        assert not part.rows[0].variant.startswith("methods-")
        assert part.name in methods.METHOD_NOTES
