"""simpletuner inspect: what is in a dataset, before anything is trained on it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from simpletuner.atomic_io import write_atomically
from simpletuner.cli.token_counter import find_token_counter
from simpletuner.config import flags
from simpletuner.config.load import load_config
from simpletuner.config.schema import DataOptions, RunConfig, trigger_word
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.dataset_file import read_dataset_file, try_read_datasets
from simpletuner.data.dataset_findings import Finding, find_problems
from simpletuner.data.rejections import make_printable
from simpletuner.data.remote_store import open_remote_store
from simpletuner.data.statistics import DatasetStatistics, TrainingLength, inspect_datasets
from simpletuner.errors import ConfigError, Problem, storage_error
from simpletuner.events.formatting import count_of
from simpletuner.events.terminal_sink import TerminalSink

COMMAND_FLAGS = (
    "config", "env", "example", "dataset", "html", "output", "trigger", "json", "headers_only",
)  # fmt: skip
SWITCHES = ("json", "headers_only")
MAX_LISTED_BUCKETS = 8
MAX_LISTED_TEXTS = 8


@click.command(
    "inspect", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    """Look at a dataset: counts, sizes, buckets, captions, copies, sharpness, passes.

    simpletuner inspect FOLDER, --dataset FILE, or --config PATH, --env NAME or --example NAME as
    for train. Any option of a training may follow, such as --resolution 768. --trigger TEXT is the
    word to check the captions for (default: modelspec_trigger or instance_prompt). --html FILE
    writes one page with a contact sheet, --json prints one object, --output FILE writes that object
    to a file. --headers-only decodes no image.
    Nothing is downloaded, and nothing is written to the dataset.
    """
    folders: list[str] = []
    pairs = flags.parse_flags(list(words), SWITCHES, folders)
    given = dict(pairs)
    _check_flags(given, folders)
    options = [pair for pair in pairs if pair[0] not in COMMAND_FLAGS]
    loaded = load_config(
        options, given.get("config"), given.get("env"), given.get("example"), needs_data=False
    )
    run = loaded.config
    datasets, notices = _read_datasets(run, folders, given.get("dataset"))
    emit = TerminalSink(sys.stderr, level="info")
    closing = click.get_current_context().with_resource(ExitStack())
    cache = run.cache.cache_dir or closing.enter_context(TemporaryDirectory(prefix="simpletuner-"))
    store = open_remote_store(datasets, run.cache, Path(cache), emit, closing)
    statistics, placed = inspect_datasets(
        datasets,
        run.data,
        _training_length(run),
        find_token_counter(run.model),
        seed=run.training.seed,
        trigger=given.get("trigger") or trigger_word(run),
        read_pixels="headers_only" not in given,
        emit=emit,
        store=store,
    )
    emit.close()
    findings = find_problems(statistics)
    if given.get("html"):
        from simpletuner.cli.inspect_page import write_page

        path = write_page(Path(str(given["html"])), statistics, findings, placed, run.data)
        click.echo(f"wrote {path}", err=True)
    text = json.dumps(statistics_as_json(statistics, findings), indent=2)
    if given.get("output"):
        _write_output(Path(str(given["output"])), text)
    if "json" in given:
        click.echo(text)
    elif not given.get("output"):
        for line in (*format_statistics(statistics, notices), *format_findings(findings)):
            click.echo(make_printable(line))


def _write_output(path: Path, text: str) -> None:
    try:
        write_atomically(path, f"{text}\n")
    except OSError as error:
        raise storage_error(f"{path} cannot be written", error) from error
    click.echo(f"wrote {path.absolute()}", err=True)


def _check_flags(given: Mapping[str, str | None], folders: Sequence[str]) -> None:
    sources = [f"--{name}" for name in ("config", "env", "example", "dataset") if name in given]
    problems = [
        Problem(f"--{name}", "needs a value")
        for name in COMMAND_FLAGS
        if name in given and name not in SWITCHES and not given[name]
    ]
    if len(folders) > 1:
        problems.append(
            Problem("", f"several folders: {', '.join(folders)}; inspect one at a time")
        )
    elif folders and "--dataset" in sources:
        problems.append(Problem("", f"{folders[0]} and --dataset both name a dataset; give one"))
    if problems:
        raise ConfigError(problems)


def _read_datasets(
    run: RunConfig, folders: Sequence[str], file: str | None
) -> tuple[Sequence[DatasetConfig], Sequence[str]]:
    """Return the datasets of the folder, of the file or of the configuration, and notices."""
    if folders:
        return [_folder_dataset(Path(folders[0]), run.data)], ()
    path = file or run.data.data_backend_config
    if path is None:
        raise ConfigError(
            "nothing to inspect; give a folder of images, --dataset FILE or --config FILE"
        )
    read = read_dataset_file(Path(path), run.data, output_dir=run.training.output_dir)
    return (*read.train, *read.eval), read.notices


def _folder_dataset(folder: Path, options: DataOptions) -> DatasetConfig:
    """Return a folder as a dataset file with nothing but its path would describe it."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    folder = folder.resolve()
    names = [path.suffix.lower() for path in folder.iterdir()]
    is_tars = ".tar" in names and not {".png", ".jpg", ".jpeg", ".webp"} & set(names)
    entry = {
        "id": folder.name or "images",
        "type": "webdataset" if is_tars else "local",
        "instance_data_dir": str(folder),
    }
    read, problems = try_read_datasets([entry], folder.parent, options)
    if problems:
        raise ConfigError(problems)
    return read.train[0]


def _training_length(run: RunConfig) -> TrainingLength:
    """Return the length of the run; where the number of processes is open, it is taken as 1."""
    count = run.distributed.num_processes
    processes = count if isinstance(count, int) else 1
    training = run.training
    return TrainingLength(
        training.train_batch_size,
        training.gradient_accumulation_steps * processes,
        training.max_train_steps,
        training.num_train_epochs,
    )


def statistics_as_json(
    statistics: DatasetStatistics, findings: Sequence[Finding]
) -> dict[str, Any]:
    """Return everything as one object."""
    return {
        **dataclasses.asdict(statistics),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def format_statistics(statistics: DatasetStatistics, notices: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the summary."""
    for facts in statistics.datasets:
        passes = "held out" if facts.passes is None else f"{facts.passes:g} passes per image"
        yield f"{facts.id}: {count_of(facts.images, 'image')}, {passes}"
    if statistics.steps is not None:
        yield f"  passes are predicted for the whole run of {count_of(statistics.steps, 'step')}"
    sizes = statistics.sizes
    small, middle, large = (
        f"{width}x{height}"
        for width, height in (sizes.smallest_px, sizes.median_px, sizes.largest_px)
    )
    yield f"sizes: {small} to {large} px, median {middle} ({sizes.megapixels:g} megapixels)"
    yield f"{count_of(len(statistics.buckets), 'bucket')}:"
    for bucket in statistics.buckets[:MAX_LISTED_BUCKETS]:
        crop = f", {bucket.cropped:.1%} cropped away" if bucket.cropped >= 0.001 else ""
        yield (f"  {bucket.width_px}x{bucket.height_px}: {count_of(bucket.images, 'image')}{crop}")
    if len(statistics.buckets) > MAX_LISTED_BUCKETS:
        yield f"  and {len(statistics.buckets) - MAX_LISTED_BUCKETS} more"
    captions = statistics.captions
    if captions.captions:
        tokens = captions.tokens
        yield (
            f"captions: {captions.captions}, {tokens.shortest} to {tokens.longest} tokens, median "
            f"{math.floor(tokens.median)} ({captions.token_source})"
        )
    for name, counts in (("tags", captions.tags), ("phrases", captions.phrases)):
        if counts:
            listed = ", ".join(
                f"{item.text} ({item.captions})" for item in counts[:MAX_LISTED_TEXTS]
            )
            yield f"frequent {name}: {listed}"
    if captions.trigger is not None:
        yield (
            f"trigger {captions.trigger.trigger!r}: in the captions of {captions.trigger.images} "
            f"of {count_of(captions.images, 'image')}"
        )
    if not statistics.pixels_read:
        yield "images were not decoded: no search for near-duplicates and blurred images"
    yield from (f"note: {note}" for note in (*notices, *statistics.notes))


def format_findings(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield a line per finding, one with what to do, and one with the first images."""
    for finding in findings:
        yield ""
        yield f"{finding.level}: {finding.message}"
        yield f"  {finding.advice}"
        if finding.sample_ids:
            yield f"  {', '.join(finding.sample_ids)}"
    if not findings:
        yield ""
        yield "nothing to warn of"
