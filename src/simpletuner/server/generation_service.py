"""Generation of images with a base and LoRAs of the workspace, as a job of the queue.

One job generates all requests, so that its network stays loaded between them; it ends when none has
come for minutes, or when another job waits for its device (cli/generation_requests.py).

generations/
    <id>/request.json    the request and its time
    <id>/command.json    the arguments of the program; its job writes state.json next to it
    <id>/*.png           the images, each with its settings as metadata
    .lock                held by a request that is added, and by the job when it closes
    .closed, .stop       the job takes no further requests; it shall not wait for further ones
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from simpletuner.atomic_io import write_atomically
from simpletuner.image_decoding import UndecodableImage, decoder_errors
from simpletuner.server.api_errors import ApiError, abort
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.job_service import JobService
from simpletuner.server.job_states import ACTIVE_STATES, ENDED_STATES
from simpletuner.server.sampling_previews import PREVIEW_FILE, preview_version
from simpletuner.server.schemas.generations import GeneratedImage, Generation, GenerationRequest
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.schemas.library import TrashEntry
from simpletuner.server.trash import Trash
from simpletuner.server.workspace import Workspace

GENERATION_ID = re.compile(r"[0-9a-f]{12}")
MAX_LISTED = 60
# As in cli/generation_requests.py, which this package does not import.
COMMAND_FILE, STATE_FILE = "command.json", "state.json"
LOCK_FILE, STOP_FILE, CLOSED_FILE = ".lock", ".stop", ".closed"
WORKER_NAME = "playground"
IMAGE_SUFFIX = ".png"


class GenerationService:
    """The folder generations/ of a workspace.

    command: the start of the command line of this program.
    """

    def __init__(
        self, workspace: Workspace, jobs: JobService, trash: Trash, command: Sequence[str]
    ) -> None:
        self._workspace = workspace
        self._jobs = jobs
        self._trash = trash
        self._command = tuple(command)
        self._folder = workspace.root / "generations"

    def create(self, request: GenerationRequest) -> Generation:
        """Queue a generation.

        Raises ApiError 422 for a path that does not exist or is not allowed.
        """
        lora = self._existing(request.lora, "lora")
        image = self._existing(request.image, "image")
        mask = self._existing(request.mask, "mask")
        if mask is not None and image is None:
            abort(422, "a mask needs the image that it belongs to", "mask")
        if lora is None and request.strengths != [1.0]:
            abort(422, "strengths need a LoRA", "strengths")
        id = secrets.token_hex(6)
        folder = self._folder / id
        folder.mkdir(parents=True)
        words = _arguments(request, folder, lora, image, mask)
        with self._locked():
            job = self._worker() or self._start_worker()
            record = {"request": request.model_dump(), "job": job.id, "created_t": time.time()}
            write_atomically(folder / "request.json", json.dumps(record, indent=1) + "\n")
            write_atomically(folder / COMMAND_FILE, json.dumps(words) + "\n")
        return self.get(id)

    def release_device(self) -> None:
        """Let the job end as soon as it has nothing to generate: another one waits for a device."""
        worker = self._worker()
        if worker is not None and worker.state != "queued":
            (self._folder / STOP_FILE).touch()

    def _worker(self) -> Job | None:
        """Return the job that will generate further requests, None without one."""
        jobs = [job for job in self._jobs.get_queue().jobs if job.kind == "generate"]
        active = [job for job in jobs if job.state not in ENDED_STATES]
        is_closed = (self._folder / CLOSED_FILE).exists()
        usable = [job for job in active if job.state == "queued" or not is_closed]
        return usable[0] if usable else None

    def _start_worker(self) -> Job:
        argv = [*self._command, "generate", f"--requests={self._folder}"]
        return self._jobs.enqueue_command("generate", WORKER_NAME, argv)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep the job from closing, and other requests from starting a second one."""
        descriptor = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def get(self, id: str) -> Generation:
        """Return a generation. Raises ApiError 404 for an unknown id."""
        return self._read(self._require_folder(id)) or abort(404, "there is no such generation")

    def list_newest(self) -> list[Generation]:
        """Return the newest generations, the newest first."""
        if not self._folder.is_dir():
            return []
        folders = [path for path in self._folder.iterdir() if GENERATION_ID.fullmatch(path.name)]
        newest = sorted(folders, key=lambda path: path.stat().st_mtime_ns, reverse=True)
        generations = (self._read(path) for path in newest[:MAX_LISTED])
        return sorted(filter(None, generations), key=lambda generation: -generation.created_t)

    def image_path(self, id: str, file: str) -> Path:
        """Return the path of an image. Raises ApiError 404 and PathOutsideWorkspace."""
        path = self.file_path(id, file)
        return path if path.suffix == IMAGE_SUFFIX else abort(404, "there is no such image")

    def file_path(self, id: str, file: str) -> Path:
        """Return the path of a file. Raises ApiError 404 and PathOutsideWorkspace."""
        return self._workspace.resolve_below(self._require_folder(id), file)

    def delete(self, id: str) -> TrashEntry:
        """Move a generation to the trash; one that is being generated is interrupted.

        The requests after it are generated by another job.
        """
        generation = self.get(id)
        folder, label = self._require_folder(id), generation.request.prompts[0][:60]
        job = generation.job
        with self._locked():
            is_running = job is not None and job.state in ACTIVE_STATES
            entry = self._trash.discard("image", label, [folder])
            remain = any(self._pending())
            if job is not None and is_running:
                (self._folder / CLOSED_FILE).touch()  # it is killed, and takes nothing more
            if job is not None and (is_running or (job.state == "queued" and not remain)):
                with contextlib.suppress(ApiError):
                    self._jobs.cancel(job.id)
            if is_running and remain:
                self._start_worker()
        return entry

    def _pending(self) -> Iterator[Path]:
        for path in self._folder.glob(f"*/{COMMAND_FILE}"):
            if not (path.parent / STATE_FILE).exists():
                yield path.parent

    def _existing(self, path: str, loc: str) -> Path | None:
        if not path:
            return None
        real = self._workspace.resolve_or_none(path)
        if real is None or not real.exists():
            abort(422, f"{path}: there is no such file in the workspace", loc)
        return real

    def _require_folder(self, id: str) -> Path:
        folder = self._folder / id if GENERATION_ID.fullmatch(id) else None
        if folder is None or not folder.is_dir():
            abort(404, "there is no such generation")
        return folder

    def _read(self, folder: Path) -> Generation | None:
        record = read_json_object(folder / "request.json") or {}
        job: Job | None = None
        with contextlib.suppress(ApiError):
            job = self._jobs.get_job(str(record.get("job", "")))
        state = read_json_object(folder / STATE_FILE)
        if job is not None and (folder / COMMAND_FILE).exists():
            job = _job_of_request(job, self._worker(), state)
        is_sampling = job is not None and job.state in ACTIVE_STATES
        try:
            return Generation(
                id=folder.name,
                created_t=record["created_t"],
                request=GenerationRequest.model_validate(record["request"]),
                job=job,
                images=self._images(folder),
                preview=preview_version(folder / PREVIEW_FILE) if is_sampling else None,
            )
        except (KeyError, ValidationError):
            return None

    def _images(self, folder: Path) -> list[GeneratedImage]:
        paths = sorted(folder.glob(f"*{IMAGE_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        images = []
        for path in paths:
            with contextlib.suppress(UndecodableImage):  # it is being written right now
                images.append(_describe_image(self._workspace, path))
        return images


def _arguments(
    request: GenerationRequest,
    folder: Path,
    lora: Path | None,
    image: Path | None,
    mask: Path | None,
) -> list[str]:
    """Return the arguments of `generate`; no value can be taken for an option of its own."""
    words = [f"--prompt={text}" for text in request.prompts]
    given: dict[str, object] = {
        "negative_prompt": request.negative_prompt,
        "model_flavour": request.flavour,
        "base_model_precision": request.precision,
        "lora": lora,
        "size": request.size,
        "image": image,
        "mask": mask,
    }
    words += [f"--{name}={value}" for name, value in given.items() if value]
    if lora is not None:
        words.append(f"--strength={','.join(f'{value:g}' for value in request.strengths)}")
    if image is not None:
        words.append(f"--denoise={request.denoise:g}")
    if request.invert_mask and mask is not None:
        words.append("--invert_mask")
    words.append("--preview")
    words += [f"--steps={request.steps}", f"--guidance={request.guidance:g}"]
    words += [f"--seed={request.seed}", f"--count={request.count}", f"--out={folder}"]
    return words


def _job_of_request(job: Job, worker: Job | None, state: dict[str, Any] | None) -> Job:
    """Return the job as one of a single request. worker: the one that takes further requests."""
    own = state or {}
    if own.get("state") in ("done", "failed"):
        message = str(own.get("message", ""))
        return job.model_copy(update={"state": own["state"], "message": message, "advice": ""})
    if own.get("state") == "running":  # a job without events stays "starting"
        is_active = job.state in ACTIVE_STATES and job.state != "stopping"
        return job.model_copy(update={"state": "running"}) if is_active else job
    waits = worker or (None if job.state in ENDED_STATES else job)
    return job if waits is None else waits.model_copy(update={"state": "queued", "message": ""})


def _describe_image(workspace: Workspace, path: Path) -> GeneratedImage:
    """Return the description of an image from its metadata. Raises UndecodableImage."""
    from PIL import Image

    with decoder_errors(), Image.open(path, formats=("PNG",)) as image:
        width, height = image.size
        image.load()
        texts = {str(key): str(value) for key, value in image.info.items()}
    seed, strength = texts.get("seed", ""), texts.get("strength", "")
    return GeneratedImage(
        file=path.name,
        path=path.relative_to(workspace.root).as_posix(),
        prompt=texts.get("prompt", ""),
        seed=int(seed) if seed.isdigit() else None,
        strength=_number(strength),
        width_px=width,
        height_px=height,
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
