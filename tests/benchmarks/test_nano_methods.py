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


@pytest.mark.parametrize(
    ("held_out", "learnt", "lost", "words"),
    [
        (-0.01, 0.2, 0.001, "lower held-out loss, more learnt"),
        (0.01, -0.2, 0.1, "higher held-out loss, less learnt, more forgotten"),
        (0.001, 0.01, -0.1, "less forgotten"),
        (0.001, 0.01, 0.001, "no difference"),
    ],
)
def test_a_difference_counts_from_twice_its_error(
    held_out: float, learnt: float, lost: float, words: str
) -> None:
    against = {
        "held_out": {"mean": held_out, "se": 0.001},
        "zorbo_zorbo": {"mean": learnt, "se": 0.05},
        "lost_all": {"mean": lost, "se": 0.02},
    }
    assert methods.verdict_in_words({"against": against}) == words


def test_a_single_seed_has_no_verdict() -> None:
    assert methods.verdict_in_words({"against": {"held_out": {"mean": 1.0, "se": None}}}) == ""
    assert methods.verdict_in_words({"against": {}}) == ""
