"""A search for the learning rate: trials rung by rung, the choice, and its record in a folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from simpletuner.atomic_io import write_atomically
from simpletuner.bounded_files import read_bounded_text
from simpletuner.cli import rate_plan, rate_trials
from simpletuner.cli.rate_plan import SearchPlan, TrialResult
from simpletuner.config.load import LoadedConfig, resolved_options
from simpletuner.config.output_folder import OWN_CACHE_FOLDER, foreign_entries
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset_config import DatasetFile
from simpletuner.errors import ConfigError
from simpletuner.events.event_log import EventLog
from simpletuner.events.event_types import Emit, NoticeIssued, RateChosen, RateTried
from simpletuner.events.findings import describe_choice
from simpletuner.events.formatting import describe_event
from simpletuner.events.sinks import fan_out, null_emit
from simpletuner.training.own_files import write_marker

REQUEST_FILE, RESULT_FILE = "request.json", "result.json"


def default_rates(run: RunConfig) -> tuple[float, ...]:
    """Return the rates that are tried unless some are named."""
    return rate_plan.default_rates(run.optimizer.learning_rate)


def search_before_training(
    loaded: LoadedConfig, backends: DatasetFile, launched: bool
) -> tuple[LoadedConfig, str]:
    """Return the configuration with the rate that a search finds, and the rate as text.

    A search that was finished before is not repeated. launched: whether a launcher has started
    this process, next to which other trainings cannot run.
    """
    if launched:
        raise ConfigError(
            "learning_rate auto starts trainings of its own, which a launcher (torchrun, Slurm) "
            "does not expect; run simpletuner tune first, and set learning_rate to what it finds"
        )
    run = loaded.config
    plan = make_plan(run, backends, default_rates(run), None)
    chosen = RateSearch(run, plan, click.echo).run()
    optimizer = run.optimizer.model_copy(update={"learning_rate": chosen.rate})
    tuning = run.tuning.model_copy(update={"learning_rate_search": False})
    with_rate = run.model_copy(update={"optimizer": optimizer, "tuning": tuning})
    notice = f"learning_rate {chosen.rate:g} was found by a search: {describe_choice(chosen)}"
    return (
        dataclasses.replace(loaded, config=with_rate, notices=(*loaded.notices, notice)),
        repr(chosen.rate),
    )


def make_plan(
    run: RunConfig, backends: DatasetFile, rates: Sequence[float], steps: int | None
) -> SearchPlan:
    """Scan the datasets and plan the search. Raises ConfigError for a run that has no rate."""
    if run.optimizer.optimizer == "prodigy":
        raise ConfigError(
            "prodigy estimates its learning rate itself; use it with learning_rate 1.0"
        )
    from simpletuner.data import held_out_split
    from simpletuner.data.scan import scan_datasets

    datasets = [*backends.train, *backends.eval]
    scanned = scan_datasets(datasets, run.data, run.training.seed, null_emit)
    eval_sets = {dataset.id for dataset in backends.eval}
    taught = {dataset.id for dataset in backends.train if not dataset.regularisation_target}
    images = [item.sample.dataset for item in scanned.samples if item.crop_index == 0]
    measured = sum(name in eval_sets for name in images)
    trained = sum(name in taught for name in images)
    tuning = run.tuning
    split = held_out_split.split_request(
        tuning.validation_split, tuning.validation_fold, trained, bool(eval_sets)
    )
    if split is not None:
        measured += split.count or trained // split.folds
    size = rate_plan.run_size(run, trained, bool(measured))
    size = dataclasses.replace(size, images=measured or trained)
    return rate_plan.plan_search(rates, size, run.validation.eval_sigma_count, steps)


def trial_row(trial: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """Return the cells of a trial in the printed table."""
    name, steps = f"{trial['rate']:g}", str(trial["steps"])
    if trial["loss"] is None:
        return name, steps, "diverged", "", ""
    difference = f"{trial['change']:+.5f} ± {trial['change_se']:.5f}"
    return name, steps, f"{trial['loss']:.5f}", difference, "chosen" if trial["chosen"] else ""


class RateSearch:
    """A search in the folder `<output_dir>-tune`, whose trials share the caches of the run."""

    def __init__(self, run: RunConfig, plan: SearchPlan, say: Callable[[str], None]) -> None:
        self.run_config, self.plan, self.say = run, plan, say
        output_dir = Path(os.path.expanduser(run.training.output_dir)).absolute()
        self.root = output_dir.with_name(f"{output_dir.name}-tune")
        self.output_dir = output_dir
        cache = run.cache.cache_dir
        self.cache_dir = Path(cache) if cache else output_dir / OWN_CACHE_FOLDER
        self.results: dict[tuple[float, int], TrialResult] = {}

    def run(self) -> RateChosen:
        """Return the result; what was finished by an earlier process is not trained again."""
        self._open_folder()
        log = EventLog(self.root / "events.jsonl")
        try:
            emit = fan_out([log, lambda event: self.say(describe_event(event))])
            emit(NoticeIssued(self.plan.describe()))
            chosen = self._search(emit)
            emit(chosen)
        finally:
            log.close()
        record = self.record(chosen)
        write_atomically(self.root / RESULT_FILE, json.dumps(record, indent=2) + "\n")
        for row in [("rate", "steps", "loss", "difference", ""), *map(trial_row, record["trials"])]:
            self.say(
                "  ".join(
                    f"{cell:>20}" if at == 3 else f"{cell:>10}" for at, cell in enumerate(row)
                )
            )
        return chosen

    def _search(self, emit: Emit) -> RateChosen:
        first, last = self.plan.rungs
        rates = list(self.plan.rates)
        results = [self._try(rate, first, emit) for rate in rates]
        if not any(result.losses for result in results):
            raise ConfigError(
                f"every learning rate diverged ({', '.join(f'{rate:g}' for rate in rates)}); "
                "name lower --rates"
            )
        beyond = rate_plan.beyond_the_grid(results)
        if beyond is not None and beyond not in rates:
            results.append(self._try(beyond, first, emit))
        finalists = rate_plan.choose_finalists(results)
        losers = {result.rate for result in results} - {result.rate for result in finalists}
        self._remove_weights(losers)
        if len(finalists) > 1:
            finalists = [self._try(result.rate, last, emit) for result in finalists]
        best = rate_plan.choose_rate(finalists)
        tried = [result.rate for result in results]
        others = [result for result in finalists if result is not best]
        change, error = rate_plan.compare(others[0], best) if others else (0.0, 0.0)
        return RateChosen(
            best.rate, best.loss, len(best.losses or ()), others[0].rate if others else None,
            change, error, self.cost(), best.rate in (min(tried), max(tried)),
        )  # fmt: skip

    def _try(self, rate: float, steps: int, emit: Emit) -> TrialResult:
        result = rate_trials.run_trial(
            self.run_config, self.plan, self.root, rate, steps, self.cache_dir
        )
        self.results[rate, steps] = result
        same = [other for (_, at), other in self.results.items() if at == steps]
        best = min(same, key=lambda other: other.loss)
        change, error = rate_plan.compare(result, best)
        loss = result.loss if result.losses else None
        emit(RateTried(rate, steps, loss, change if result.losses else 0.0, error))
        return result

    def cost(self) -> float:
        """Return what the trials have cost, in runs."""
        reached: dict[float, int] = {}
        for rate, steps in self.results:
            reached[rate] = max(steps, reached.get(rate, 0))
        plan, size = self.plan, self.plan.size
        forwards = rate_plan.FORWARDS_PER_SAMPLE * size.batch * sum(reached.values())
        measured = plan.images * plan.sigmas * len(self.results)
        return plan.folds * (forwards + measured) / size.forwards

    def record(self, chosen: RateChosen) -> dict[str, Any]:
        """Return the choice and its trials as numbers, for result.json and --json.

        A trial has its rate, steps, loss (None where it diverged), change and change_se from the
        best one at these steps, and whether it was chosen.
        """
        trials = []
        for (rate, steps), result in sorted(self.results.items(), key=lambda item: item[0][::-1]):
            same = [other for (_, at), other in self.results.items() if at == steps]
            trial: dict[str, Any] = {"rate": rate, "steps": steps, "loss": None}
            if result.losses is not None:
                best = min(same, key=lambda other: other.loss)
                change, error = rate_plan.compare(result, best)
                trial |= {"loss": result.loss, "change": change, "change_se": error}
            last = max(at for tried, at in self.results if tried == rate)
            trials.append({**trial, "chosen": rate == chosen.rate and steps == last})
        return {**dataclasses.asdict(chosen), "trials": trials}

    def _remove_weights(self, rates: set[float]) -> None:
        """Delete the checkpoints of rates that are not trained on; their losses stay."""
        for rate in rates:
            for fold in range(self.plan.folds + 1):
                folder = rate_trials.TrialFolder(self.root, rate, fold).path
                for path in (*folder.glob("checkpoint-*"), *folder.glob("transformer*")):
                    shutil.rmtree(path, ignore_errors=True)

    def _open_folder(self) -> None:
        """Create the folder, or check that the search in it is this one."""
        request = {
            "options": {
                name: value
                for name, value in resolved_options(self.run_config).items()
                if name not in ("learning_rate", "learning_rate_search")
            },
            "plan": dataclasses.asdict(self.plan),
        }
        text = json.dumps(request, indent=2) + "\n"
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_marker(self.output_dir)  # its cache, which the trials fill, belongs to the run
        path = self.root / REQUEST_FILE
        if path.is_file():
            if read_bounded_text(path) != text:
                raise ConfigError(
                    f"{self.root} holds a search with other options, images or rates; delete the "
                    "folder, or choose another output_dir"
                )
            return
        entries = foreign_entries(self.root)
        if entries:
            raise ConfigError(
                f"{self.root} holds other files ({', '.join(entries[:5])}), and the search writes "
                "there; choose another output_dir"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
