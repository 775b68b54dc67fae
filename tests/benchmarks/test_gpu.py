"""The GPU suite at toy size on the CPU: it measures, resumes, and tells what did not work."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import suite
from benchmarks.gpu.cases import FULL_SIZE, TOY_SIZE, Case, SuiteSize, all_cases
from benchmarks.gpu.measurement_record import CRASHED, MEASURED, STARTED, MeasurementRecord
from benchmarks.gpu.random_weights import RandomChroma, fill_with_random_weights

from simpletuner.config.load import config_from_resolved
from simpletuner.quantization.quantized_linear import QuantizedLinear

FEW = "theirs bf16 512 kept,ours bf16 512 kept,ours nf4 512 recomputed,ours nf4 512*swapped,restore int4"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def toy(results: Path, only: str) -> dict[str, dict[str, Any]]:
    assert suite.main(["--toy", "--only", only, "--results", str(results)]) == 0
    told = json.loads((results / "gpu-toy.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in told["rows"]}


def test_cases_are_measured_or_refused_and_told(results: Path) -> None:
    rows = toy(results, FEW)
    states = {name: row["state"] for name, row in rows.items()}
    assert states.pop("ours nf4 512 recomputed all swapped") == "refused"  # a CPU has nowhere to swap to
    assert len(states) == 4
    assert set(states.values()) == {MEASURED}
    ours, theirs = rows["ours bf16 512 kept"], rows["theirs bf16 512 kept"]
    assert ours["measured"]["trained"] == theirs["measured"]["trained"]  # the same modules are adapted
    assert 0 < ours["plan"]["flops"] < theirs["measured"]["flops"]  # theirs computes padding
    assert ours["measured"]["first_loss"] != ours["measured"]["last_loss"]  # it trains
    page = (results / "gpu-toy.md").read_text(encoding="utf-8")
    assert "**refused**: musubi_blocks_to_swap" in page
    assert "| 512 | kept | no_change |" in page


def test_the_same_command_goes_on_where_it_was(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = MeasurementRecord(results / "gpu-toy.json")
    first, second = (case for case in all_cases() if case.kind == "restore" and case.precision != "nf4")
    record.update_row(first, STARTED)  # its process was lost
    monkeypatch.setitem(suite.MEASURE_BY_KIND, "restore", lambda case, world: pytest.fail(case.name))
    record.update_row(second, MEASURED, measured={"linear_s": 1.0})
    assert [case.kind for case in record.pending_cases([first, second])] == []
    again = MeasurementRecord(record.file)
    again.mark_crashed()
    assert {name: row["state"] for name, row in again.rows.items()} == {
        first.name: CRASHED,
        second.name: MEASURED,
    }


def out_of_memory(case: Case, world: SuiteSize) -> dict[str, Any]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 18.00 GiB. GPU 0 has ...")


def test_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suite.MEASURE_BY_KIND, "ours", out_of_memory)
    state, facts = suite.run_case(all_cases()[1], TOY_SIZE)
    assert state == "out of memory"
    assert "18.00 GiB was asked for" in facts["why"]


def test_a_device_out_of_order_ends_the_process_for_a_fresh_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case: Case, world: SuiteSize) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(suite.MEASURE_BY_KIND, "theirs", broken)
    record = MeasurementRecord(tmp_path / "gpu-toy.json")
    assert (
        suite.run_pending_cases(record, all_cases(), TOY_SIZE, begun=time.time(), limit_s=60.0)
        == suite.EXIT_RESTART_CHILD
    )
    assert [row["state"] for row in record.rows.values()] == ["failed"]
    record.update_row(all_cases()[1], STARTED)
    record.drop_started()
    assert len(MeasurementRecord(record.file).rows) == 1


def test_no_case_begins_when_the_time_is_up(tmp_path: Path) -> None:
    record = MeasurementRecord(tmp_path / "gpu-toy.json")
    suite.run_pending_cases(record, all_cases(), TOY_SIZE, begun=0.0, limit_s=60.0)
    assert not record.rows


def test_every_case_is_a_config_that_the_product_takes() -> None:
    assert len({case.name for case in all_cases()}) == len(all_cases())
    for case in all_cases():
        if case.kind == "ours":
            flat = case.run_options(FULL_SIZE)
            run = config_from_resolved(flat)
            assert run.model.base_model_precision == case.precision
            assert run.model.dynamo_backend == ("inductor" if case.compiled else "no")
            assert run.model.musubi_blocks_to_swap == flat.get("musubi_blocks_to_swap", 0)


def test_random_weights_leave_nothing_on_the_meta_device() -> None:
    world = dataclasses.replace(TOY_SIZE, device="cpu")
    options = config_from_resolved({"base_model_precision": "int4", "device": "cpu"}).model
    network = RandomChroma(world).build_spec(options, torch.bfloat16).transformer
    fill_with_random_weights(network, torch.device("cpu"), torch.device("cpu"))
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    linears = [module for module in network.modules() if isinstance(module, QuantizedLinear)]
    assert linears
    assert all(0.015 < float(linear.weight.float().std()) < 0.025 for linear in linears)
