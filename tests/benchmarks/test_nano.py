"""The tables of benchmarks/nano: their arithmetic, their order of work, and their smallest corner."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.nano import (
    densities_figure,
    densities_page,
    experiment_inputs,
    experiments,
    markdown_tables,
    result_tables,
)
from benchmarks.nano.__main__ import DOCS, FIGURE_NAME, PAGE_NAME, RESULTS, main
from benchmarks.nano.cell_result import RESULT_FILE, CellResult
from benchmarks.nano.cell_runner import CellQueue
from benchmarks.nano.experiments import FULL_EXPERIMENT, SEEDS, SMOKE_TEST, TABLES, Cell
from benchmarks.nano.measured_part import END_MARK, begin_mark
from benchmarks.nano.padded import make_padded_batch
from safetensors import safe_open

from simpletuner.config.load import load_config
from simpletuner.config.schema import ModelOptions
from simpletuner.events.sinks import null_emit
from simpletuner.models.chroma.text_encoder import ChromaTextEncoder, load_text_encoder
from simpletuner.models.registry import get_family

COMMAND = "python -m benchmarks.nano"
# one name of a measured figure -> what it is worth here, by (row, seed)
ROUGH = {"quadratic": (0.100, 0.110, 0.130), "uniform": (0.090, 0.105, 0.120)}


def one_result(held_out: float, **changes: object) -> CellResult:
    made = CellResult(
        cell="", options={"learning_rate": 2e-3}, base="b", date="2026-01-02", seconds=9.0, step_seconds=0.2,
        loss_mean=0.2, loss_variance=4e-4, grad_mean=0.3, grad_variance=1e-3, held_out=held_out,
        held_out_start=0.5, by_sigma=[(0.25, held_out + 0.1), (0.75, held_out - 0.05)],
        by_sigma_start=[(0.25, 0.6), (0.75, 0.4)],
        scores={"zorbo": {"zorbo": (0.5, 0.1, 32), "all": (0.25, 0.1, 32)},
                "shapes": {"all": (0.5, 0.1, 64), "shape": (0.75, 0.1, 90)}},
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture
def done() -> dict[str, CellResult]:
    variants = {row.label: row.variant for row in TABLES["density"][0].rows}
    found = {
        experiments.cell_name(variants[label], seed): one_result(value)
        for label, values in ROUGH.items()
        for seed, value in zip(SEEDS, values)
    }
    del found[experiments.cell_name(variants["uniform"], 3)]
    touched = {"shapes": {"all": (0.75, 0.1, 64), "shape": (0.8, 0.1, 90)}}
    found[experiments.cell_name("base", 1)] = one_result(0.5, scores=touched)
    return found


def made(done: dict[str, CellResult], name: str = "density") -> result_tables.TableData:
    return result_tables.build_table(name, done, FULL_EXPERIMENT, SEEDS, COMMAND, "b")


def test_means_errors_and_paired_differences(done: dict[str, CellResult]) -> None:
    quadratic, *_, uniform, _ = made(done)["parts"][0]["rows"]
    measured = quadratic["measures"]["held_out"]
    assert measured["mean"] == pytest.approx(0.34 / 3, rel=1e-5)
    assert measured["se"] == pytest.approx(
        statistics.stdev(ROUGH["quadratic"]) / math.sqrt(3), rel=1e-5
    )
    assert uniform["label"] == "uniform"
    assert uniform["finished"] == 2
    # seeds 1 and 2 only: -0.010 and -0.005; unpaired means over other seeds would say -0.0158
    assert uniform["against"]["held_out"]["mean"] == pytest.approx(-0.0075, rel=1e-5)
    assert uniform["against"]["held_out"]["se"] == pytest.approx(0.0025, rel=1e-5)
    assert quadratic["measures"]["lost_all"]["mean"] == pytest.approx(0.25)


def test_what_is_not_finished_is_said(done: dict[str, CellResult]) -> None:
    page = markdown_tables.render_page([made(done, name) for name in TABLES])
    lines = {
        line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")
    }
    assert "3 of 3" in markdown_tables.render_part_table(made(done)["parts"][0])
    assert "| uniform | 2 of 3 | 0.0975 ± 0.0075 | -0.0075 ± 0.0025 |" in page
    assert "| parabola | 0 of 3 | - | - |" in page
    assert lines["full rank, fp32 master"].count("0 of 3") == 1


def test_the_page_of_the_densities_tells_the_table(done: dict[str, CellResult]) -> None:
    page = densities_page.update_page(
        f"before\n{begin_mark(densities_page.COMMAND)}\nold\n{END_MARK}\nafter", made(done)
    )
    assert page.startswith("before\n")
    assert page.endswith("\nafter")
    assert "old" not in page
    assert "Lowest held-out loss: uniform, 3.0 standard errors from quadratic: not clear" in page
    assert "not measured yet." in page.split("From scratch")[1]


def test_the_plot_shows_what_is_measured(done: dict[str, CellResult]) -> None:
    curves = densities_figure.change_curves(made(done)["parts"][0])
    assert [curve.name for curve in curves] == ["quadratic", "uniform"]
    changes = [
        100 * (u + 0.1) / (q + 0.1) - 100 for u, q in zip(ROUGH["uniform"][:2], ROUGH["quadratic"])
    ]
    assert curves[1].points[0][1] == pytest.approx(statistics.fmean(changes), rel=1e-4)
    assert densities_figure.change_curves(made({})["parts"][0]) == []
    drawn = densities_figure.render_figure(made(done))
    assert drawn.count("<polyline") == len(experiments.DENSITIES) + 2


@pytest.mark.parametrize("name", experiments.DENSITIES)
def test_a_drawn_density_has_the_mass_of_a_density(name: str) -> None:
    points = densities_figure.density_curve(name).points
    assert sum(share for _, share, _ in points) / len(points) == pytest.approx(1, abs=1e-6)
    hole = [share for sigma, share, _ in points if 0.27 < sigma < 0.73]
    assert (max(hole) == 0) == (name == "quadratic-literal")


def test_work_waits_for_what_it_needs_and_goes_on_without_what_failed() -> None:
    variant = experiments.Variant("v", "lesson")
    first, second, third = Cell(variant, 1), Cell(variant, 2, ("v/seed-1",)), Cell(variant, 3)
    queue = CellQueue([second, first, third], set())
    assert [queue.claim(), queue.claim()] == [first, third]
    queue.mark_ended(third, None)
    queue.mark_ended(first, "broken")
    assert queue.claim() is None
    assert queue.failed == {"v/seed-1": "broken", "v/seed-2": "needs v/seed-1"}
    assert queue.done == {"v/seed-3"}
    assert CellQueue([first, second], {"v/seed-1"}).claim() == second


def test_every_row_has_its_cells_and_every_need_comes_first() -> None:
    known = experiments.build_variants(FULL_EXPERIMENT)
    assert {row.variant for parts in TABLES.values() for part in parts for row in part.rows} <= set(
        known
    )
    listed = experiments.list_cells(FULL_EXPERIMENT, SEEDS)
    names = [cell.name for cell in listed]
    assert len(set(names)) == len(names)
    assert {cell.variant.name for cell in listed} == set(known)
    for place, cell in enumerate(listed):
        assert set(cell.needs) <= set(names[:place]), cell.name


@pytest.mark.parametrize("size", [FULL_EXPERIMENT, SMOKE_TEST], ids=["whole", "corner"])
def test_the_product_takes_every_cell_as_it_is_meant(
    size: experiments.ExperimentSize, tmp_path: Path
) -> None:
    place = experiment_inputs.ExperimentInputs(tmp_path)
    for data in {cell.variant.data for cell in experiments.list_cells(size, SEEDS)}:
        place.dataset_file(data).write_text("[]")
    place.untrained_transformer.mkdir(parents=True)
    # Of one seed: cells of other seeds differ by its number alone.
    for cell in experiments.list_cells(size, SEEDS[:1]):
        config = tmp_path / "config.json"
        options = {
            **experiment_inputs.cell_options(cell, size),
            **place.path_options(cell, tmp_path / "run", None),
        }
        config.write_text(json.dumps(options))
        loaded = load_config(config_path=config, environ={}, cwd=tmp_path)
        # The example's prompts stay in a cell's options; every cell switches validation off.
        unexpected = [
            note
            for note in loaded.notices
            if "no effect" in note and "with validation_disable true" not in note
        ]
        assert unexpected == [], cell.name


def test_the_lesson_is_the_example_and_rows_differ_from_it_by_what_they_say() -> None:
    cells = {
        cell.name: experiment_inputs.cell_options(cell, FULL_EXPERIMENT)
        for cell in experiments.list_cells(FULL_EXPERIMENT, SEEDS)
    }
    lesson, example = cells["lesson/seed-2"], experiment_inputs.example_options()
    changed = {name for name in example if name in lesson and lesson[name] != example[name]}
    assert changed <= {"max_train_steps", "checkpoint_step_interval"}
    for name, options in (("lesson-uniform", {"chroma_sigma_density"}), ("rank-64", {"lora_rank"})):
        other = cells[f"{name}/seed-2"]
        assert {key for key in lesson if lesson[key] != other.get(key)} == options


def test_tiny_stands_for_modules_that_the_base_has() -> None:
    weights = (
        experiment_inputs.BUNDLED_BASE_DIR / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    with safe_open(weights, "pt") as file:
        assert {f"{name}.weight" for name in experiments.TINY_TARGETS} <= set(file.keys())


def test_the_committed_pages_are_those_of_the_committed_results() -> None:
    found = [RESULTS / f"{name}.json" for name in TABLES if (RESULTS / f"{name}.json").exists()]
    page = (DOCS / PAGE_NAME).read_text(encoding="utf-8")
    if not found:
        assert "not measured yet." in page
        return
    known = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == markdown_tables.render_page(known)
    density = next(one for one in known if one["table"] == "density")
    assert densities_page.update_page(page, density) == page
    assert (DOCS / FIGURE_NAME).read_text(encoding="utf-8") == densities_figure.render_figure(
        density
    )


def corner(folder: Path, *only: str) -> int:
    return main(["--corner", "--workers", "1", "--out", str(folder), *only])


@pytest.mark.slow
def test_the_smallest_corner_goes_through_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The untouched base, scored, and two rows of two steps; the same command has nothing left to
    do.
    """
    assert corner(tmp_path, "--only", "stratified") == 0, capsys.readouterr().out
    table = json.loads((tmp_path / "results" / "stratified.json").read_text())
    (part,) = table["parts"]
    assert {"shapes_all", "zorbo_zorbo"} <= set(part["untouched"])
    independent, stratified = (row["measures"] for row in part["rows"])
    assert independent["loss_mean"]["mean"] != stratified["loss_mean"]["mean"]
    assert independent["held_out"]["mean"] == pytest.approx(
        stratified["held_out"]["mean"], rel=1e-4
    )
    assert "| stratified | 1 of 1 |" in (tmp_path / "results" / "README.md").read_text()
    assert str(tmp_path) not in json.dumps(table)

    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob(RESULT_FILE)}
    assert len(results) == 3
    capsys.readouterr()
    assert corner(tmp_path, "--only", "stratified") == 0
    assert "3 of 3 cells are finished" in capsys.readouterr().out
    assert results == {path: path.stat().st_mtime_ns for path in tmp_path.rglob(RESULT_FILE)}


@pytest.mark.slow
def test_the_whole_corner(tmp_path: Path) -> None:
    assert corner(tmp_path) == 0
    density = json.loads((tmp_path / "results" / "density.json").read_text())
    assert density["parts"][1]["rows"][0]["finished"] == 1
    assert "<svg" in (tmp_path / "results" / FIGURE_NAME).read_text()
    (part,) = json.loads((tmp_path / "results" / "text.json").read_text())["parts"]
    trimmed, used_trimmed, padded = (row["measures"] for row in part["rows"])
    assert padded["held_out_start"]["mean"] != trimmed["held_out_start"]["mean"]
    # this row starts from the padded one's LoRA, and as good as stays there
    used = used_trimmed["held_out"]["mean"]
    assert used == pytest.approx(used_trimmed["held_out_start"]["mean"], rel=1e-4)
    assert used != trimmed["held_out_start"]["mean"]


def test_padded_rows_are_the_trimmed_ones_and_the_encoder_s_own_for_pads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, options = get_family("chroma"), ModelOptions(model_flavour="nano", mixed_precision="no")
    files = family.locate_files(options, null_emit)
    encoder = load_text_encoder(files, options, torch.device("cpu"), null_emit)
    captions = ["a big red zorbo in the centre, navy background", "a star"]
    trimmed_texts = encoder.encode(captions)
    monkeypatch.setattr(ChromaTextEncoder, "_make_batch", make_padded_batch)
    for padded_text, trimmed_text in zip(encoder.encode(captions), trimmed_texts, strict=True):
        rows, trimmed = padded_text["rows"], trimmed_text["rows"]
        assert rows.shape == (experiments.PADDED_ROWS, trimmed.shape[1])
        torch.testing.assert_close(rows[: len(trimmed)], trimmed, rtol=0, atol=1e-5)
        assert rows[-1].abs().max() > 0
