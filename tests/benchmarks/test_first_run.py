"""The first run on a GPU at toy size on the CPU: every check, and what happens when one fails."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import select
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.gpu import equal_runs, first_run, numerics, process_supervisor
from benchmarks.gpu.check_catalog import SCHEMES, catalog, plan_name
from benchmarks.gpu.check_runner import DONE, RESTART, TimeLimit, run_checks
from benchmarks.gpu.checks import Check, Outcome
from benchmarks.gpu.comparison import Comparison, have_same_bits, relative_error
from benchmarks.gpu.process_supervisor import CANNOT_RUN, SupervisedRun, interrupted_result
from benchmarks.gpu.random_weights import RandomChroma, fill_with_random_weights
from benchmarks.gpu.results_file import CheckResult, ResultsFile
from benchmarks.gpu.results_page import results_page
from benchmarks.gpu.simpletuner_step import StepCase
from benchmarks.gpu.timing import union_length
from benchmarks.gpu.workload import FULL, TOY

from simpletuner.config.load import config_from_resolved
from simpletuner.models.block_swap import BlockSwap
from simpletuner.quantization.quantized_linear import QuantizedLinear

CHECKS = {check.name: check for check in catalog()}
STEPS = [check for check in CHECKS.values() if check.target == "simpletuner_step.measure"]


@pytest.fixture
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def time_limit(seconds: float = 3600.0) -> TimeLimit:
    return TimeLimit(time.time(), seconds, toy=True)


def run_here(folder: Path, checks: list[Check]) -> dict[str, CheckResult]:
    """Run checks in this process at toy size and return their results."""
    results = ResultsFile(folder / "results.jsonl")
    assert run_checks(checks, results, time_limit(), "cpu") == DONE
    return results.read()


def run_one(folder: Path, name: str) -> CheckResult:
    return run_here(folder, [CHECKS[name]])[name]


def make_checks(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> list[Check]:
    """Make checks with the names of these functions, which they call."""
    module = ModuleType("benchmarks.gpu.test_module")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.test_module", module)
    return [Check(name, "test", f"test_module.{name}", 1.0) for name in functions]


# The rehearsal


@pytest.mark.timeout(900)
def test_every_check_of_a_rehearsal_is_ok(tmp_path: Path, user_cache: None) -> None:
    checks = first_run.select_checks("*", toy=True)
    results = run_here(tmp_path, checks)
    assert list(results) == [check.name for check in checks]
    assert {name: result.reason for name, result in results.items() if not result.ok} == {}
    assert all(result.figures for result in results.values())
    assert_figures(results)
    page = results_page(results, checks)
    assert "No check failed." in page
    assert "Not run" not in page
    for result in results.values():
        if result.group in ("correctness", "step", "diffusers"):
            assert f"| {result.name} |" in page


def assert_figures(results: dict[str, CheckResult]) -> None:
    """Check what the figures of a rehearsal must be on every machine."""
    equal = [result for name, result in results.items() if name.startswith("equal: ")]
    assert len(equal) > 10
    for result in equal:
        tensors = next(iter(result.figures.values()))
        assert tensors["different"] == 0
        assert tensors["of"] > 50
    ours = results["bf16 512 px not checkpointed"].figures
    theirs = results["diffusers 512 px not checkpointed padded"].figures
    plan = results[plan_name("bf16 512 px not checkpointed")].figures
    assert ours["trained"] == theirs["trained"]  # the same modules have adapters
    assert 0 < plan["flops"] < theirs["flops"]  # diffusers computes padding
    assert ours["kernels"] > 100
    assert results[plan_name("nf4 1024 px checkpointed all swapped, on host")].figures["moved"] > 0
    lengths = results["text lengths, default"].figures
    assert lengths["lengths"] == len(TOY.text_lengths) == len(lengths["first_s"])
    programs = results["compiled and eager"].figures["programs"]
    assert programs[0] == programs[-1] > 0


def test_a_rehearsal_calls_the_function_of_every_check() -> None:
    rehearsed = {check.target for check in first_run.select_checks("*", toy=True)}
    assert {check.target for check in CHECKS.values()} == rehearsed


def test_every_step_is_a_config_that_the_package_accepts() -> None:
    assert len(STEPS) > 30
    for check in STEPS:
        case = StepCase(**check.arguments)
        config = config_from_resolved(case.run_options(FULL, FULL.config))
        assert config.model.base_model_precision == case.precision
        assert config.model.dynamo_backend == ("inductor" if case.compiled else "no")
        assert config.model.musubi_blocks_to_swap == round(57 * case.swapped)
        assert (config.model.model_type == "full") == case.full_rank


def test_names_are_unique_and_every_step_has_a_plan() -> None:
    assert len(CHECKS) == len(catalog())
    for check in STEPS:
        assert plan_name(check.name) in CHECKS


# Checks can fail


def test_a_swap_that_changes_weights_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    equal_runs.train_slice.cache_clear()
    start_transfer = BlockSwap._start_transfer

    def start_wrong_transfer(self: BlockSwap, number: int) -> object:
        self._pinned_blocks[number].host_bytes[:64] += 1
        return start_transfer(self, number)

    monkeypatch.setattr(BlockSwap, "_start_transfer", start_wrong_transfer)
    result = run_one(tmp_path, "equal: all blocks swapped")
    equal_runs.train_slice.cache_clear()
    assert result.ok is False
    assert "tensors differ" in result.reason


def test_a_wrong_gradient_on_the_gpu_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_and_backward = numerics.forward_and_backward
    calls: list[int] = []

    def with_a_wrong_gradient(*arguments: Any) -> Any:
        parts = forward_and_backward(*arguments)
        calls.append(1)
        if len(calls) == 2:  # the first call is the CPU's, the second the GPU's in float32
            name = next(iter(parts["gradients"]))
            parts["gradients"][name] *= 1.01
        return parts

    monkeypatch.setattr(numerics, "forward_and_backward", with_a_wrong_gradient)
    result = run_one(tmp_path, "CPU and GPU")
    assert result.ok is False
    assert result.reason.startswith("fp32 gradients: relative error 1.00e-02 in ")


def test_a_sample_that_attends_to_padding_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_and_backward = numerics.forward_and_backward

    def without_lengths(network: Any, batch: Any, workload: Any) -> Any:
        padded = {
            name: (tensor.shape[1],) * len(tensor) for name, tensor in batch.text.tensors.items()
        }
        text = dataclasses.replace(batch.text, lengths=padded)
        return forward_and_backward(network, dataclasses.replace(batch, text=text), workload)

    monkeypatch.setattr(numerics, "forward_and_backward", without_lengths)
    result = run_one(tmp_path, "unequal batch")
    assert result.ok is False
    assert "unmasked output: relative error" in result.reason


def test_comparisons() -> None:
    expected, actual = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.002])
    assert relative_error(actual, expected) == pytest.approx(0.002 / 5**0.5, rel=1e-3)
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    assert relative_error(torch.ones(1), torch.zeros(1)) == float("inf")
    assert have_same_bits(expected, expected.clone())
    assert not have_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not have_same_bits(expected, expected.double())
    comparison = Comparison()
    comparison.expect_close("near", {"a": actual}, {"a": expected}, 1e-2)
    assert comparison.outcome().ok
    comparison.expect_close("far", {"a": actual}, {"a": expected}, 1e-5)
    comparison.expect_bit_equal("bits", {"a": actual}, {"a": expected})
    comparison.expect_bit_equal("names", {"a": expected}, {"b": expected})
    labels = [failure.split(":")[0] for failure in comparison.failures]
    assert labels == ["far", "bits", "names", "names"]
    assert comparison.figures["bits"]["different"] == 1


def test_seconds_in_which_a_kernel_ran() -> None:
    assert union_length([(0, 2), (1, 3), (5, 6), (5.5, 5.75)]) == 4
    assert union_length([]) == 0


# A failing check, the time limit, resuming


def test_a_check_that_raises_is_reported_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(workload: Any) -> Outcome:
        raise ValueError("no such thing\nsecond line")

    checks = make_checks(monkeypatch, broken=broken, good=lambda workload: Outcome({"figure": 1}))
    results = run_here(tmp_path, checks)
    assert results["broken"].ok is False
    assert results["broken"].reason == "ValueError: no such thing"
    assert "in broken" in results["broken"].error
    assert "second line" in results["broken"].error
    assert results["good"].ok is True
    assert results["good"].figures == {"figure": 1}
    assert "- **broken**: ValueError: no such thing" in results_page(results, checks)


def test_a_broken_cuda_context_asks_for_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(workload: Any) -> Outcome:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    checks = make_checks(monkeypatch, broken=broken, good=lambda workload: Outcome({}))
    results = ResultsFile(tmp_path / "results.jsonl")
    assert run_checks(checks, results, time_limit(), "cpu") == RESTART
    assert results.done() == {"broken"}


def test_a_check_that_does_not_fit_in_the_time_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = make_checks(monkeypatch, good=lambda workload: Outcome({}))
    results = ResultsFile(tmp_path / "results.jsonl")
    assert run_checks(checks, results, time_limit(seconds=0.5), "cpu") == DONE
    (result,) = results.read().values()
    assert result.ok is None
    assert result.reason == "it takes about 1 s, and 0 s remain"
    assert results.done() == set()  # with more time it runs
    assert run_checks(checks, results, time_limit(), "cpu") == DONE
    assert results.read()["good"].ok is True


def test_a_check_without_its_packages_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    missing = {"diffusers", "peft"}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in missing else find_spec(name, *rest),
    )
    checks = [check for check in CHECKS.values() if missing & {*check.required_packages}]
    results = run_here(tmp_path, checks)
    assert len(results) > 8
    reasons = {result.group: result.reason for result in results.values() if result.ok is None}
    assert reasons["diffusers"] == "not installed: diffusers, peft"
    assert reasons["correctness"] == "not installed: diffusers"


def test_an_incomplete_line_is_ignored(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "results.jsonl")
    results.append(CheckResult("one", "test", True))
    with results.path.open("a") as file:
        file.write('{"name": "two", "gro')
    results.append(CheckResult("three", "test", False))
    results.append(CheckResult("one", "test", None))
    found = {name: result.ok for name, result in results.read().items()}
    assert found == {"one": None, "three": False}
    assert results.done() == {"three"}


def test_the_result_of_a_check_says_how_its_process_ended() -> None:
    check = Check("one", "test", "test_module.one", 10.0)
    crashed = interrupted_result(check, 3.0, "", -11)
    assert crashed.reason == "the process ended during this check: SIGSEGV"
    hung = interrupted_result(check, 61.0, "hung", -9)
    assert hung.reason == "killed after 61 s: about 10 s were expected"
    stopped = interrupted_result(check, 5.0, "time", -9)
    assert stopped.ok is None  # it runs again
    assert stopped.reason == "stopped by the time limit after 5 s"


# The command


def run_command(out: Path, *more: str) -> int:
    return first_run.main(["--toy", "--device", "cpu", "--out", str(out), *more])


def test_the_command_resumes_where_it_stopped(
    tmp_path: Path, user_cache: None, capfd: pytest.CaptureFixture[str]
) -> None:
    out, only = tmp_path / "results.jsonl", "rates;quantised bits"
    assert run_command(out, "--only", only, "--minutes", "0") == 0
    assert ResultsFile(out).done() == set()
    ResultsFile(out).append(CheckResult("rates", "environment", False, reason="broken"))
    assert run_command(out, "--only", only) == 1
    results = ResultsFile(out).read()
    assert results["rates"].reason == "broken"  # a result is not computed again
    assert results["quantised bits"].ok is True
    assert capfd.readouterr().out.endswith(f"1 ok, 1 failed, 0 not run: {out}\n")
    assert run_command(out, "--only", only, "--retry") == 0
    assert ResultsFile(out).read()["rates"].ok is True
    capfd.readouterr()
    assert run_command(out, "--only", only, "--table") == 0
    assert capfd.readouterr().out.startswith("# First run on a GPU\n")


def test_a_check_that_ends_its_process_costs_its_own_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process is killed, one hangs and one works."""
    program = tmp_path / "worker.py"
    program.write_text(
        "import json, os, signal, sys, time\n"
        "pipe, out = int(sys.argv[sys.argv.index('--status-pipe') + 1]), sys.argv[1]\n"
        "lines = open(out).readlines() if os.path.exists(out) else []\n"
        "done = {json.loads(line)['name'] for line in lines}\n"
        "for name in ('killed', 'hangs', 'good'):\n"
        "    if name in done:\n"
        "        continue\n"
        "    os.write(pipe, f'{name}\\n'.encode())\n"
        "    if name == 'killed':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    if name == 'hangs':\n"
        "        time.sleep(600)\n"
        "    line = {'name': name, 'group': 'test', 'ok': True}\n"
        "    open(out, 'a').write(json.dumps(line) + '\\n')\n"
        "    os.write(pipe, b'\\n')\n"
    )
    monkeypatch.setattr(process_supervisor, "SCRIPT", program)
    monkeypatch.setattr("benchmarks.gpu.checks.SLACK_S", 0.5)
    out = tmp_path / "results.jsonl"
    expected_s = {"killed": 100.0, "hangs": 0.0, "good": 100.0}
    checks = [Check(name, "test", "test_module.none", s) for name, s in expected_s.items()]
    run = SupervisedRun(checks, ResultsFile(out), time_limit(), "cpu", [str(out)], {})
    assert process_supervisor.supervise(run) == 0
    results = ResultsFile(out).read()
    assert results["killed"].reason == "the process ended during this check: SIGKILL"
    assert results["hangs"].ok is False
    assert "about 0 s were expected" in results["hangs"].reason
    assert results["good"].ok is True
    assert first_run.print_summary(run) == 1


def test_the_time_limit_stops_a_running_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "worker.py"
    program.write_text(
        "import os, sys, time\n"
        "os.write(int(sys.argv[sys.argv.index('--status-pipe') + 1]), b'slow\\n')\n"
        "time.sleep(600)\n"
    )
    started: list[int] = []  # the time is up as soon as the check has started

    def wait(*arguments: Any) -> Any:
        ready = select.select(*arguments)
        started.append(1)
        return ready

    monkeypatch.setattr(process_supervisor, "SCRIPT", program)
    monkeypatch.setattr(process_supervisor, "select", SimpleNamespace(select=wait))
    monkeypatch.setattr(TimeLimit, "remaining_s", lambda limit: 0.0 if started else 600.0)
    results = ResultsFile(tmp_path / "results.jsonl")
    checks = [Check("slow", "test", "test_module.none", 100.0)]
    run = SupervisedRun(checks, results, time_limit(), "cpu", [], {})
    assert process_supervisor.supervise(run) == 0
    (result,) = results.read().values()
    assert result.ok is None
    assert result.reason.startswith("stopped by the time limit after")


def test_one_line_says_why_nothing_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    monkeypatch.setitem(first_run.REQUIRED, "no_such_module", "no-such-package")
    assert run_command(out) == CANNOT_RUN
    assert capsys.readouterr().err == "not installed: no-such-package\n"
    monkeypatch.delitem(first_run.REQUIRED, "no_such_module")
    assert first_run.main(["--device", "cpu", "--only", "rates"]) == CANNOT_RUN
    assert "--toy" in capsys.readouterr().err
    assert run_command(out, "--only", "nothing") == CANNOT_RUN
    assert "--list" in capsys.readouterr().err


def test_the_catalog_is_listed_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_run.main(["--list", "--only", "micro"]) == 0
    assert capsys.readouterr().out.count("dequantise ") == len(SCHEMES)
    folder = process_supervisor.SCRIPT.parent
    for name in ("first_run", "check_catalog", "checks", "results_file", "process_supervisor"):
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        assert "\nimport torch" not in source
        assert "\nfrom torch" not in source


def test_random_weights_leave_nothing_on_the_meta_device() -> None:
    options = config_from_resolved({"base_model_precision": "int4", "device": "cpu"}).model
    network = RandomChroma(TOY.config).build_spec(options, torch.bfloat16).transformer
    fill_with_random_weights(network, torch.device("cpu"), torch.device("cpu"))
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    linears = [module for module in network.modules() if isinstance(module, QuantizedLinear)]
    assert linears
    assert all(0.015 < float(linear.weight.float().std()) < 0.025 for linear in linears)


def test_a_line_is_json_with_the_documented_fields(tmp_path: Path) -> None:
    run_one(tmp_path, "rates")
    (text,) = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"name", "group", "ok", "figures", "seconds", "error"} <= json.loads(text).keys()
