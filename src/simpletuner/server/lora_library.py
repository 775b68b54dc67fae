"""The LoRA files of a workspace, and jobs that check, convert, add up and merge them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from simpletuner.server.api_errors import abort
from simpletuner.server.job_service import JobService
from simpletuner.server.run_artifacts import CHECKPOINT_NAME, LORA_FILE, checkpoint_step
from simpletuner.server.run_service import RunService
from simpletuner.server.schemas.generations import LoraExportRequest, LoraInfo
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.schemas.library import TrashEntry
from simpletuner.server.schemas.runs import RunSummary
from simpletuner.server.trash import Trash
from simpletuner.server.workspace import Workspace

DEFAULT_FORMAT = "diffusers"
SUFFIX = ".safetensors"


class LoraLibrary:
    """The LoRAs of all runs, and the files in the folder loras/ of the workspace.

    command: the start of the command line of this program.
    """

    def __init__(
        self,
        workspace: Workspace,
        runs: RunService,
        jobs: JobService,
        trash: Trash,
        command: Sequence[str],
    ) -> None:
        self._workspace = workspace
        self._runs = runs
        self._jobs = jobs
        self._trash = trash
        self._command = tuple(command)
        self.folder = workspace.root / "loras"

    def list_loras(self) -> list[LoraInfo]:
        """Return all LoRA files, the newest first."""
        loras = [*self._own_files()]
        for summary in self._runs.summaries():
            loras += self._files_of_run(summary)
        return sorted(loras, key=lambda lora: -lora.changed_t)

    def start(self, request: LoraExportRequest) -> Job:
        """Queue a check, an export or a merge.

        Raises ApiError: 422 for a missing file or name, 409 for a name that is taken.
        """
        parts = [(self.find(part.path), part.weight) for part in request.parts]
        first, weight = parts[0]
        if request.action == "check":
            argv = ["export", str(first), "--check"]
            return self._jobs.enqueue_command("check", first.name, [*self._command, *argv])
        if not request.name:
            abort(422, "the new file needs a name", "name")
        self.folder.mkdir(exist_ok=True)
        if request.action == "merge":
            target = self.folder / request.name
            loras = [f"--lora={path}={weight:g}" for path, weight in parts]
            argv = ["merge", *loras, f"--output={target}", "--format=diffusers"]
        else:
            target = self.folder / f"{request.name}{SUFFIX}"
            others = [f"--with={path}={weight:g}" for path, weight in parts[1:]]
            format = request.format or DEFAULT_FORMAT
            argv = ["export", str(first), f"--strength={weight:g}", *others]
            argv += [f"--format={format}", f"--output={target}"]
            argv += [f"--rank={request.rank}"] if request.rank is not None else []
        if os.path.lexists(target):
            abort(409, f"there is already a {target.name} in loras/", "name")
        return self._jobs.enqueue_command(request.action, target.name, [*self._command, *argv])

    def delete(self, path: str) -> TrashEntry:
        """Move a file of the folder loras/ to the trash. Raises ApiError 404, 409."""
        file = self.find(path)
        if file.parent != self.folder:
            abort(409, "this file belongs to a run; delete the checkpoint or the run")
        return self._trash.discard("lora", file.name, [file])

    def find(self, path: str) -> Path:
        """Return the path of a LoRA file. Raises ApiError 422 for any other file."""
        real = self._workspace.resolve_or_none(path)
        if real is None or not real.is_file() or real.suffix != SUFFIX:
            abort(422, f"{path}: there is no such LoRA in the workspace", "path")
        return real

    def _own_files(self) -> Iterator[LoraInfo]:
        for file in sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder.is_dir() else ():
            yield self._describe(file, file.stem, None, None, "")

    def _files_of_run(self, summary: RunSummary) -> Iterator[LoraInfo]:
        folder = self._runs.find_folder(summary.id)
        reader = self._runs.find_reader(summary.id)
        if folder is None or reader is None:
            return
        flavour = str(reader.config().get("model_flavour", "base"))
        outputs = [file for file in folder.glob(f"*{SUFFIX}") if not file.is_symlink()]
        for file in outputs:
            kind = "" if file.name == LORA_FILE else f" ({file.name.split('.')[-2]})"
            yield self._describe(file, f"{summary.name}{kind}", summary, None, flavour)
        for checkpoint in folder.glob("checkpoint-*"):
            if not CHECKPOINT_NAME.fullmatch(checkpoint.name):
                continue
            step = checkpoint_step(checkpoint)
            try:
                yield self._describe(checkpoint / LORA_FILE, summary.name, summary, step, flavour)
            except FileNotFoundError:  # it has no such file, or its run is deleting it
                continue

    def _describe(
        self, file: Path, name: str, run: RunSummary | None, step: int | None, flavour: str
    ) -> LoraInfo:
        status = file.stat()
        below_root = self._workspace.root in file.parents
        path = file.relative_to(self._workspace.root).as_posix() if below_root else str(file)
        return LoraInfo(
            path=path,
            name=name,
            run=run.id if run else "",
            run_name=run.name if run else "",
            step=step,
            flavour=flavour,
            size_bytes=status.st_size,
            changed_t=status.st_mtime,
            removable=file.parent == self.folder,
        )
