"""A run that is finished and started again: recognised from its files, without torch.

Where anything may have changed since the run ended, the training itself decides: it compares what
it resumes from in detail.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from simpletuner.config.load import resolved_options
from simpletuner.config.option_catalog import all_options
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset_config import DatasetFile
from simpletuner.training.own_files import list_results
from simpletuner.training.run_folder import RunFolder

RESUMING = ("latest", "must")
CHECKPOINTING = "gradient_checkpointing"
# What the memory plan resolves where it is "auto"; a resumed run keeps the choice.
CHOSEN_BY_PLAN = (CHECKPOINTING, "dynamo_backend")


def end_finished_run(run: RunConfig, backends: DatasetFile) -> str | None:
    """Record the end of a run that has nothing left to do, and return what to report of it.

    None where that is not certain. Raises RunLocked where another process trains there.
    """
    report = describe_finished_run(run, backends)
    if report is not None:
        with RunFolder(_run_dir(run)) as folder:
            folder.write_exit_status(0, "done", run.training.max_train_steps or 0)
    return report


def describe_finished_run(run: RunConfig, backends: DatasetFile) -> str | None:
    """Return what to report of a run that has nothing left to do; None where that is not certain.

    It has ended without an error at max_train_steps, with the same options. Its last checkpoint and
    its result are there, and every local file that it read is older than its end.
    """
    run_dir = _run_dir(run)
    ended, stored = _read_object(run_dir / "exit.json"), _read_object(run_dir / "config.json")
    steps = run.training.max_train_steps
    if run.checkpoint.resume_from_checkpoint not in RESUMING or ended is None or stored is None:
        return None
    if (ended.get("status"), ended.get("exit_code"), ended.get("step")) != ("done", 0, steps):
        return None
    if not _has_same_options(run, stored):
        return None
    results = list_results(run_dir)
    if not results or not (run_dir / f"checkpoint-{steps}" / "state.json").is_file():
        return None
    datasets = (*backends.train, *backends.eval)
    if not all(dataset.has_folder and dataset.instance_data_dir.is_dir() for dataset in datasets):
        return None
    folders = [dataset.instance_data_dir for dataset in datasets]
    tables = [dataset.caption_table.path for dataset in datasets if dataset.caption_table]
    if any((run_dir / "control").glob("*")):
        return None
    if _latest_change_s([*_files_of_options(run), *folders, *tables]) > float(ended.get("t", 0)):
        return None
    complete = "the one step is" if steps == 1 else f"all {steps} steps are"
    names = ", ".join(path.name for path in results)
    return (
        f"{run_dir}: {complete} complete ({names}); to train further, raise max_train_steps, and "
        "to start over, choose another output_dir"
    )


def _run_dir(run: RunConfig) -> Path:
    return Path(os.path.expanduser(run.training.output_dir)).absolute()


def describe_stored_choice(run: RunConfig) -> str:
    """Describe without torch the choice of gradient_checkpointing "auto"."""
    stored = (_read_object(_run_dir(run) / "config.json") or {}).get(CHECKPOINTING)
    if isinstance(stored, bool):
        count = "none of the" if stored else "all"
        return f"{CHECKPOINTING} auto: {count} blocks keep their activations, as in {_run_dir(run)}"
    if isinstance(stored, int):
        return (
            f"{CHECKPOINTING} auto: {stored} blocks compute their activations again and the "
            f"others keep them, as in {_run_dir(run)}"
        )
    return (
        f"{CHECKPOINTING} auto: the start of the training decides how many blocks keep their "
        "activations, by the free memory; simpletuner plan --fit shows what fits"
    )


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _has_same_options(run: RunConfig, stored: dict[str, Any]) -> bool:
    now = json.loads(json.dumps(resolved_options(run)))
    for name in CHOSEN_BY_PLAN:
        if now[name] == "auto" and name in stored:
            now[name] = stored[name]
    return bool(now == stored)


def _files_of_options(run: RunConfig) -> Iterator[Path]:
    """Yield the local files and folders that options name, except those that the run writes."""
    values = resolved_options(run)
    for option in all_options().values():
        value = values[option.name]
        if option.path in ("file", "hub") and isinstance(value, str):
            path = Path(os.path.expanduser(value))
            if path.exists():
                yield path


def _latest_change_s(paths: Iterable[Path]) -> float:
    """Return when the latest of these files and folders was changed, in unix seconds.

    Of files it is the time of a change, of a renaming or a copy, whatever time they show.
    """
    latest = 0.0
    for path in paths:
        latest = max(latest, path.stat().st_ctime)
        for folder, names, files in os.walk(path, followlinks=True):
            for name in (*names, *files):
                try:
                    latest = max(latest, os.stat(os.path.join(folder, name)).st_ctime)
                except OSError:  # a link that leads nowhere
                    return float("inf")
    return latest
