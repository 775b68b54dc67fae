"""The search for the learning rate: its plan and cost, its choice, and that it can be interrupted."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from simpletuner.cli import rate_plan, rate_search, rate_trials
from simpletuner.cli.rate_plan import RunSize, TrialResult
from simpletuner.cli.rate_search import RateSearch, search_before_training
from simpletuner.cli.tune import command, parse_steps
from simpletuner.config.load import LoadedConfig, try_load_mapping
from simpletuner.config.schema import RunConfig
from simpletuner.errors import ConfigError, SimpleTunerError, TrainingStopped
from simpletuner.events.event_log import EventLog, read_events
from simpletuner.events.event_types import RateChosen, RateTried, SampleLossesMeasured
from simpletuner.training.run_folder import RunFolder

HELD_OUT = RunSize(1000, 4, 20, True)
IDS = [f"d/{number}.png" for number in range(16)]


def result(rate: float, loss: float, spread: float = 0.0, steps: int = 10) -> TrialResult:
    """Losses around `loss`; the deviations of a rate from the common ones have size `spread`."""
    random = np.random.default_rng(round(-1000 * math.log(rate)))
    noise = random.normal(0, spread, len(IDS)) if spread else np.zeros(len(IDS))
    return TrialResult(
        rate, steps, {name: float(at + loss + noise[at]) for at, name in enumerate(IDS)}
    )


# The plan


@pytest.mark.parametrize("steps", [250, 1000, 20_000])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("count", [2, 5])
def test_a_search_costs_at_most_one_and_a_half_runs(
    steps: int, batch: int, held_out: bool, count: int
) -> None:
    size = RunSize(steps, batch, 40, held_out)
    rates = tuple(1e-5 * 2**number for number in range(count))
    plan = rate_plan.plan_search(rates, size, 8)
    assert plan.cost <= 1.5
    assert plan.folds == (1 if held_out else 2)
    first, last = plan.rungs
    assert last == 8 * first
    bigger = replace(plan, rungs=(first + 1, 8 * first + 8))
    assert bigger.cost > 1.5 or last >= steps
    assert f"{plan.cost:.2f} times" in plan.describe()


def test_steps_that_cost_more_are_refused() -> None:
    plan = rate_plan.plan_search((1e-4, 2e-4), HELD_OUT, 8, 300)
    assert plan.rungs == (37, 300)
    assert rate_plan.plan_search((1e-4, 2e-4), HELD_OUT, 8, 30).rungs == (10, 30)
    assert rate_plan.plan_search((1e-4, 2e-4), HELD_OUT, 8, 12).rungs == (4, 12)
    short = rate_plan.plan_search((1e-4, 2e-4), RunSize(40, 8, 20, True), 8)
    assert short.rungs[1] == 3 * short.rungs[0]  # an eighth would be too short
    with pytest.raises(ConfigError, match="--steps 900 costs"):
        rate_plan.plan_search((1e-4, 2e-4), HELD_OUT, 8, 900)
    with pytest.raises(ConfigError, match="too short to try 5"):
        rate_plan.plan_search(rate_plan.default_rates(1e-4), RunSize(10, 1, 20, True), 8)


@pytest.mark.parametrize("text", ["", "1e-4", "1e-4,x", "0,1e-4", "1e-4,11", "nan,1e-4"])
def test_rates_that_cannot_be_tried_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--rates"):
        rate_plan.parse_rates(text)


def test_rates_are_sorted_and_the_default_spans_two_powers_of_ten() -> None:
    assert rate_plan.parse_rates("4e-4,5e-5,4e-4") == (5e-5, 4e-4)
    assert rate_plan.default_rates(1e-4) == (1e-5, 3.2e-5, 1e-4, 3.2e-4, 1e-3)
    with pytest.raises(ConfigError, match="--steps: '-3'"):
        parse_steps("-3")


# The choice


def test_the_best_and_the_next_lower_rate_are_trained_on() -> None:
    results = [result(1e-5, 0.9), result(1e-4, 0.5), result(1e-3, 0.51)]
    assert [one.rate for one in rate_plan.choose_finalists(results)] == [1e-4, 1e-5]


def test_without_a_lower_rate_a_second_best_that_is_not_clearly_worse_goes_on() -> None:
    uneven = TrialResult(
        1e-3, 10, {name: at + 0.51 + 0.1 * (-1) ** at for at, name in enumerate(IDS)}
    )
    close = [result(1e-4, 0.5), uneven, result(1e-2, 0.9)]
    assert [one.rate for one in rate_plan.choose_finalists(close)] == [1e-4, 1e-3]
    clear = [result(1e-4, 0.5), result(1e-3, 0.6)]
    assert [one.rate for one in rate_plan.choose_finalists(clear)] == [1e-4]


def test_within_the_error_the_lower_rate_is_chosen() -> None:
    tied = [
        result(1e-4, 0.5),
        TrialResult(5e-5, 10, {n: at + 0.5 + 0.1 * (-1) ** at for at, n in enumerate(IDS)}),
    ]
    assert rate_plan.choose_rate(tied).rate == 5e-5
    _, error = rate_plan.compare(tied[1], tied[0])
    for errors, rate in ((1.9, 5e-5), (2.1, 1e-4)):
        losses = {name: loss + errors * error for name, loss in tied[1].losses.items()}
        worse = TrialResult(5e-5, 10, losses)
        assert rate_plan.choose_rate([tied[0], worse]).rate == rate
    assert rate_plan.choose_rate([result(1e-4, 0.5), result(5e-5, 0.6)]).rate == 1e-4


def test_the_grid_is_extended_at_its_edges() -> None:
    assert rate_plan.beyond_the_grid([result(1e-4, 0.5), result(2e-4, 0.6)]) == 5e-5
    assert rate_plan.beyond_the_grid([result(1e-4, 0.6), result(2e-4, 0.5)]) == 4e-4
    middle = [result(1e-4, 0.6), result(2e-4, 0.5), result(4e-4, 0.7)]
    assert rate_plan.beyond_the_grid(middle) is None


def test_a_rate_that_diverges_is_the_worst() -> None:
    gone = TrialResult(1e-2, 10, None)
    results = [gone, result(1e-1, 0.5)]
    assert [one.rate for one in rate_plan.choose_finalists(results)] == [1e-1]
    assert rate_plan.compare(gone, results[1])[0] == math.inf


# The whole search, with trials that only write what a training would


class FakeTrials:
    """Losses that are lowest at rate 1e-4; the trial of `stops_at` is interrupted once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[tuple[str, int]] = []
        self.configs: list[dict[str, Any]] = []
        self.stops_at: int | None = None
        monkeypatch.setattr(rate_trials, "train_in_child", self)

    def __call__(self, config: Path, folder: rate_trials.TrialFolder, log: Path) -> None:
        if len(self.trained) == self.stops_at:
            self.stops_at = None
            raise TrainingStopped("stopped")
        options = json.loads(config.read_text())
        self.configs.append(options)
        steps, rate = options["max_train_steps"], options["learning_rate"]
        self.trained.append((folder.path.name, steps))
        folder.path.mkdir(exist_ok=True)
        if rate > 0.5:
            (folder.path / "exit.json").write_text('{"exit_code": 4}')
            return
        ids = IDS[:8] if folder.fold < 2 else IDS[8:]
        losses = {name: 1.0 + abs(math.log10(rate / 1e-4)) / 10 for name in ids}
        log_file = EventLog(folder.path / "events.jsonl")
        measured = {name: (loss, loss) for name, loss in losses.items()}
        log_file.append(SampleLossesMeasured(steps, "d", "eval", measured, ()))
        log_file.close()


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> FakeTrials:
    return FakeTrials(monkeypatch)


def search(tmp_path: Path, size: RunSize = HELD_OUT, **given: Any) -> RateSearch:
    run = RunConfig()
    training = run.training.model_copy(update={"output_dir": str(tmp_path / "run")})
    rates = given.pop("rates", (1e-5, 1e-4, 1e-3))
    plan = rate_plan.plan_search(rates, size, 8)
    return RateSearch(run.model_copy(update={"training": training}), plan, lambda line: None)


def test_the_best_rate_is_found_and_written(tmp_path: Path, trials: FakeTrials) -> None:
    chosen = search(tmp_path).run()
    assert (chosen.rate, chosen.at_edge, chosen.images) == (1e-4, False, 8)
    record = json.loads((tmp_path / "run-tune" / "result.json").read_text())
    assert record["rate"] == 1e-4
    rows = [(row["rate"], row["steps"]) for row in record["trials"]]
    first, last = search(tmp_path / "plan").plan.rungs
    assert rows == [(1e-5, first), (1e-4, first), (1e-3, first), (1e-5, last), (1e-4, last)]
    assert [row["chosen"] for row in record["trials"]] == [False, False, False, False, True]
    assert record["trials"][-1]["loss"] == chosen.loss
    printed = rate_search.trial_row(record["trials"][-1])
    assert printed == ("0.0001", str(last), f"{chosen.loss:.5f}", "+0.00000 ± 0.00000", "chosen")
    assert rate_search.trial_row({"rate": 1.0, "steps": 2, "loss": None})[2] == "diverged"
    events = [one.event for one in read_events(tmp_path / "run-tune" / "events.jsonl")]
    assert [type(event) for event in events if isinstance(event, (RateTried, RateChosen))] == [
        *[RateTried] * 5, RateChosen,
    ]  # fmt: skip
    caches = {config["cache_dir"] for config in trials.configs}
    assert caches == {str(tmp_path / "run" / "cache")}
    (tmp_path / "run" / "cache").mkdir(exist_ok=True)
    with RunFolder(tmp_path / "run"):
        pass  # the training that follows may use the folder


def test_an_interrupted_search_continues(tmp_path: Path, trials: FakeTrials) -> None:
    whole = search(tmp_path / "whole").run()
    expected = list(trials.trained)
    trials.trained, trials.stops_at = [], 1
    with pytest.raises(TrainingStopped):
        search(tmp_path / "parts").run()
    assert search(tmp_path / "parts").run() == whole
    assert trials.trained == expected
    assert search(tmp_path / "parts").run() == whole
    assert trials.trained == expected  # nothing is trained a second time


def test_a_search_with_other_options_is_not_continued(tmp_path: Path, trials: FakeTrials) -> None:
    search(tmp_path).run()
    with pytest.raises(ConfigError, match="with other options, images or rates"):
        search(tmp_path, rates=(1e-4, 2e-4)).run()


def test_folds_measure_every_image(tmp_path: Path, trials: FakeTrials) -> None:
    chosen = search(tmp_path, RunSize(1000, 4, 16, False)).run()
    assert (chosen.rate, chosen.images) == (1e-4, 16)
    assert {config["validation_fold"] for config in trials.configs} == {"1/2", "2/2"}
    assert ("rate-0.0001-fold-2" in {name for name, _ in trials.trained}) is True


def test_the_search_goes_beyond_the_grid_and_past_divergence(
    tmp_path: Path, trials: FakeTrials
) -> None:
    chosen = search(tmp_path, rates=(4e-4, 2e-3, 1.0)).run()
    assert chosen.rate == 8e-5
    assert chosen.at_edge
    with pytest.raises(ConfigError, match="every learning rate diverged"):
        search(tmp_path / "other", rates=(0.9, 1.0)).run()


def test_a_trial_measures_and_publishes_nothing_else(tmp_path: Path, trials: FakeTrials) -> None:
    run = RunConfig()
    publishing = run.publishing.model_copy(update={"push_to_hub": True})
    logging = run.logging.model_copy(update={"report_to": "wandb"})
    run = run.model_copy(update={"publishing": publishing, "logging": logging})
    plan = rate_plan.plan_search((1e-4, 2e-4), HELD_OUT, 8)
    folder = rate_trials.TrialFolder(tmp_path, 1e-4)
    options = rate_trials.trial_options(run, plan, folder, 20, tmp_path / "cache")
    assert options.keys().isdisjoint({"push_to_hub", "report_to", "webhook_config"})
    tried = try_load_mapping(options, tmp_path)
    assert tried.problems == ()
    assert tried.loaded is not None
    assert not any("no effect" in notice for notice in tried.loaded.notices)


def test_a_child_that_fails_is_reported_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = rate_trials.TrialFolder(tmp_path, 1e-4)
    monkeypatch.setattr(rate_trials.sys, "executable", "/bin/sh")
    real = rate_trials.subprocess.Popen

    def start(command: list[str], **given: Any) -> Any:
        return real(["/bin/sh", "-c", "echo out of luck; exit $CODE"], **given)

    monkeypatch.setattr(rate_trials.subprocess, "Popen", start)
    monkeypatch.setenv("CODE", "8")
    with pytest.raises(SimpleTunerError, match=r"exit code 8.*\n.*out of luck"):
        rate_trials.train_in_child(tmp_path / "c.json", folder, tmp_path / "log")
    monkeypatch.setenv("CODE", "75")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped, match="to continue"):
        rate_trials.train_in_child(tmp_path / "c.json", folder, tmp_path / "log")
    assert signal.getsignal(signal.SIGTERM) is before


# learning_rate auto


def loaded(options: Mapping[str, Any], tmp_path: Path) -> LoadedConfig:
    tried = try_load_mapping(options, tmp_path)
    assert tried.loaded is not None, tried.problems
    return tried.loaded


def test_learning_rate_auto_is_a_search(tmp_path: Path) -> None:
    run = loaded({"learning_rate": "auto"}, tmp_path).config
    assert run.tuning.learning_rate_search
    assert run.optimizer.learning_rate == RunConfig().optimizer.learning_rate
    assert not loaded({"learning_rate": 1e-3}, tmp_path).config.tuning.learning_rate_search
    both = loaded({"learning_rate_search": True, "learning_rate": 1e-3}, tmp_path).config
    assert both.tuning.learning_rate_search
    prodigy = try_load_mapping({"learning_rate": "auto", "optimizer": "prodigy"}, tmp_path)
    assert "estimates its learning rate itself" in str(prodigy.problems[0])


def test_a_launcher_cannot_search(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run simpletuner tune first"):
        search_before_training(loaded({"learning_rate": "auto"}, tmp_path), None, True)  # type: ignore[arg-type]


def test_bad_input_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(command, ["--example", "chroma-nano.peft-lora", "--rates", "1e-4"])
    assert isinstance(done.exception, ConfigError)
    assert "--rates: '1e-4' is not a list of at least two rates" in str(done.exception)
    words = ["--example", "chroma-nano.peft-lora", "--dry-run"]
    planned = CliRunner().invoke(command, words)
    assert planned.exit_code == 0, planned.output
    assert "This costs at most 1." in planned.output
    printed = json.loads(CliRunner().invoke(command, [*words, "--json"]).stdout)
    assert 1.0 < printed["cost"] <= 1.5
    assert len(printed["rates"]) == 5
