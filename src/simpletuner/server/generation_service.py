"""Generation of images with a base and LoRAs of the workspace, as jobs of the queue.

generations/<id>/
    request.json     the request, its job and its time
    *.png            the images, each with its settings as metadata
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from simpletuner.atomic_io import write_atomically
from simpletuner.image_decoding import UndecodableImage, decoder_errors
from simpletuner.server.api_errors import ApiError, abort
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.job_service import JobService
from simpletuner.server.schemas.generations import GeneratedImage, Generation, GenerationRequest
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.schemas.library import TrashEntry
from simpletuner.server.trash import Trash
from simpletuner.server.workspace import Workspace

GENERATION_ID = re.compile(r"[0-9a-f]{12}")
MAX_LISTED = 60
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
        argv = [*self._command, *_arguments(request, folder, lora, image, mask)]
        job = self._jobs.enqueue_command("generate", request.prompts[0][:60], argv, folder)
        record = {"request": request.model_dump(), "job": job.id, "created_t": time.time()}
        write_atomically(folder / "request.json", json.dumps(record, indent=1) + "\n")
        return self.get(id)

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
        path = self._workspace.resolve_below(self._require_folder(id), file)
        return path if path.suffix == IMAGE_SUFFIX else abort(404, "there is no such image")

    def delete(self, id: str) -> TrashEntry:
        """Move a generation to the trash; its job is cancelled first."""
        generation = self.get(id)
        if generation.job is not None:
            with contextlib.suppress(ApiError):
                self._jobs.cancel(generation.job.id)
        label = generation.request.prompts[0][:60]
        return self._trash.discard("image", label, [self._require_folder(id)])

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
        try:
            return Generation(
                id=folder.name,
                created_t=record["created_t"],
                request=GenerationRequest.model_validate(record["request"]),
                job=job,
                images=self._images(folder),
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
    words = ["generate", *(f"--prompt={text}" for text in request.prompts)]
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
    words += [f"--steps={request.steps}", f"--guidance={request.guidance:g}"]
    words += [f"--seed={request.seed}", f"--count={request.count}", f"--out={folder}"]
    return words


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
