"""Changes of many captions at once, their tags, and jobs that caption a dataset with a model."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from simpletuner.atomic_io import write_atomically
from simpletuner.config.captioning_models import (
    DEFAULT_PROMPT,
    KNOWN_MODELS,
    model_for_memory,
)
from simpletuner.server.api_errors import abort
from simpletuner.server.caption_files import MAX_CAPTION_CHARS, read_caption
from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.job_service import JobService
from simpletuner.server.schemas.captioning import (
    CaptionChange,
    CaptionEditRequest,
    CaptionEditResult,
    CaptioningInfo,
    CaptioningModelInfo,
    CaptioningRequest,
    CaptionOverview,
    TagCount,
)
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.schemas.system import DeviceInfo
from simpletuner.server.trash import Trash
from simpletuner.server.workspace import Workspace

MAX_EXAMPLES = 12
MAX_TAGS = 200


class CaptionDesk:
    """Work on the captions of datasets.

    command: the start of the command line of this program. devices: returns the accelerators.
    """

    def __init__(
        self,
        workspace: Workspace,
        datasets: DatasetService,
        jobs: JobService,
        trash: Trash,
        command: Sequence[str],
        devices: Callable[[], Sequence[DeviceInfo]],
    ) -> None:
        self._workspace = workspace
        self._datasets = datasets
        self._jobs = jobs
        self._trash = trash
        self._command = tuple(command)
        self._devices = devices

    def edit(self, name: str, request: CaptionEditRequest) -> CaptionEditResult:
        """Change captions, or return a preview of the change.

        The old files move to the trash. Raises ApiError 404, and 422 for a change without meaning
        or a caption that would be too long.
        """
        change = _text_change(request)
        changes: list[tuple[str, Path, str, str]] = []
        for file, path in self._datasets.caption_files(name, request.files):
            before = read_caption(path)
            if before is None or not before.strip():
                continue
            after = "\n".join(change(line) if line.strip() else line for line in before.split("\n"))
            if len(after) > MAX_CAPTION_CHARS:
                abort(
                    422, f"the caption of {file} would be longer than {MAX_CAPTION_CHARS}", "text"
                )
            if after != before and after.strip():
                changes.append((file, path, before, after))
        examples = [
            CaptionChange(file=file, before=before, after=after)
            for file, _, before, after in changes[:MAX_EXAMPLES]
        ]
        if request.preview or not changes:
            return CaptionEditResult(count=len(changes), examples=examples)
        paths = [path for _, path, _, _ in changes]
        extra = {"dataset": name}
        label = f"{name}: {len(changes)} captions"
        entry = self._trash.discard("captions", label, paths, extra, copies=True)
        for _, path, _, after in changes:
            write_atomically(path, after)
        self._datasets.invalidate(name)
        return CaptionEditResult(count=len(changes), examples=examples, trash=entry)

    def overview(self, name: str) -> CaptionOverview:
        """Return the tags and the lengths of the captions that have been read."""
        captions = [" ".join(texts) for texts in self._datasets.captions(name)]
        tags: Counter[str] = Counter()
        for caption in captions:
            tags.update({part.strip() for part in caption.split(",") if part.strip()})
        words = [len(caption.split()) for caption in captions] or [0]
        return CaptionOverview(
            tags=[TagCount(tag=tag, count=count) for tag, count in tags.most_common(MAX_TAGS)],
            captions=len(captions),
            shortest_words=min(words),
            median_words=statistics.median(words),
            longest_words=max(words),
        )

    def captioning_info(self) -> CaptioningInfo:
        """Return the models with the memory of this machine, and the captioning jobs."""
        sizes = [device.memory_total_bytes for device in self._devices() if device.kind != "cpu"]
        largest = max((size for size in sizes if size is not None), default=None)
        jobs = [job for job in self._jobs.get_queue().jobs if job.kind == "caption"]
        return CaptioningInfo(
            models=[
                CaptioningModelInfo(
                    id=model.id,
                    memory_gb=model.memory_gb,
                    fits=None if largest is None else model.memory_gb * 1e9 <= largest,
                )
                for model in KNOWN_MODELS
            ],
            suggested=model_for_memory(largest).id,
            prompt=DEFAULT_PROMPT,
            jobs=sorted(jobs, key=lambda job: -job.queued_t),
        )

    def start_captioning(self, request: CaptioningRequest) -> Job:
        """Queue the captioning of a dataset; the same request continues where it was interrupted.

        Images that the user has excluded from the dataset are left alone. Raises ApiError: 404 for
        an unknown dataset, 409 if it is being captioned already.
        """
        folder = self._datasets.require_folder(request.dataset)
        for job in self._jobs.get_queue().jobs:
            active = job.kind == "caption" and job.ended_t is None
            if active and job.name == request.dataset:
                abort(409, f"{request.dataset} is being captioned already")
        local = self._workspace.resolve_or_none(request.model)
        model = str(local) if local is not None and local.is_dir() else request.model
        notes = self._workspace.server_dir / "captioning"
        notes.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(request.model_dump_json().encode()).hexdigest()[:16]
        argv = [*self._command, "caption", str(folder), f"--model={model}"]
        argv += [f"--prompt={request.prompt}", f"--max-tokens={request.max_tokens}"]
        if request.overwrite:  # without it, images that have a caption are left out anyway
            self._forget_complete_pass(notes / f"{key}.jsonl", request.dataset)
            argv += ["--overwrite", f"--record={notes / f'{key}.jsonl'}"]
        if request.files is not None:
            write_atomically(notes / f"{key}.files.json", json.dumps(request.files))
            argv.append(f"--files={notes / f'{key}.files.json'}")
        if excluded := self._datasets.choices.of(folder).excluded:
            write_atomically(notes / f"{key}.excluded.json", json.dumps(sorted(excluded)))
            argv.append(f"--exclude={notes / f'{key}.excluded.json'}")
        return self._jobs.enqueue_command("caption", request.dataset, argv)

    def _forget_complete_pass(self, record: Path, dataset: str) -> None:
        """Move the record of earlier captions aside unless the last job was interrupted."""
        ended = [
            job
            for job in self._jobs.get_queue().jobs
            if job.kind == "caption" and job.name == dataset and job.state == "done"
        ]
        if ended and record.is_file():
            shutil.move(record, record.with_suffix(".old"))


def _text_change(request: CaptionEditRequest) -> Callable[[str], str]:
    """Return the function that changes one line of a caption. Raises ApiError 422."""
    find, text = request.find, request.text
    needs_find = request.action in ("replace", "remove_tag")
    if "\n" in text or any("\ud800" <= char <= "\udfff" or char == "\0" for char in find + text):
        abort(422, "the text must be one line", "text")
    if needs_find and not find:
        abort(422, "enter the text to find", "find")
    if not needs_find and not text.strip():
        abort(422, "enter the text to add", "text")
    match request.action:
        case "replace":
            return lambda line: line.replace(find, text)
        case "prefix":
            return lambda line: line if line.startswith(text) else f"{text}{line}"
        case "suffix":
            return lambda line: line if line.endswith(text) else f"{line}{text}"
        case "remove_tag":
            wanted = find.strip()
            return lambda line: (
                ", ".join(part for part in re.split(r"\s*,\s*", line.strip()) if part != wanted)
                if wanted in re.split(r"\s*,\s*", line.strip())
                else line
            )
