"""Uploads to the hub beside a run: retried with growing pauses, told by events, never the end of the run."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import disable_progress_bars

from simpletuner.config.schema import PublishingOptions
from simpletuner.errors import SimpleTunerError
from simpletuner.events.event_types import Emit, Event, NoticeIssued, WarningIssued
from simpletuner.events.sinks import call_and_catch
from simpletuner.training.model_card import list_card_images, write_model_card
from simpletuner.training.model_metadata import RunMetadata

RETRY_DELAYS_S = (5.0, 20.0, 60.0, 180.0, 600.0)
UPLOAD_BASE_TIMEOUT_S, MIN_UPLOAD_BYTES_PER_S = (
    600.0,
    1e6,
)  # so long, and the time of this many bytes per second
NON_RETRYABLE_STATUS = (400, 401, 403, 404, 409)  # answers that asking again does not change
RESULT_PATTERNS = ("*.safetensors", "ema/*.safetensors", "transformer/*", "transformer_ema/*")


def list_result_files(run_dir: Path) -> list[Path]:
    """What a finished run has to publish: weights, the card and its pictures; nothing that names a path."""
    found = [path for pattern in RESULT_PATTERNS for path in sorted(run_dir.glob(pattern))]
    card = run_dir / "README.md"
    if card.is_file():
        found += [card, *(run_dir / name for name in list_card_images(card))]
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


def repository_name(options: PublishingOptions, run_dir: Path) -> str:
    """hub_model_id, or the run folder's name as the hub takes it."""
    return (
        options.hub_model_id
        or re.sub(r"[^\w.-]+|--+|\.\.+", "-", run_dir.name).strip("-.")
        or "chroma"
    )


class HubPublisher:
    """One thread that uploads what is offered, in order, each as one commit. failed: why the last was not.

    private: of a repository that is made; into one that is public nothing is put unless private is
    False. api: the hub's; its token is the one that is logged in, or HF_TOKEN. The repository is
    made at once, so that a refusal is known at the start.
    """

    def __init__(
        self,
        run_dir: Path,
        repo: str,
        private: bool,
        emit: Emit,
        api: HfApi | None = None,
        pauses_s: Sequence[float] = RETRY_DELAYS_S,
    ) -> None:
        self.run_dir, self.repo, self.failure = run_dir, repo, ""
        self._private, self._emit, self._retry_delays_s = private, emit, pauses_s
        self._api, self._repository_ready, self._non_retryable = api or HfApi(), False, False
        self._queue: queue.Queue[tuple[Sequence[Path], str]] = queue.Queue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._process_queue, name="publish", daemon=True)
        self.enqueue((), "the repository")
        self._thread.start()

    def enqueue(self, files: Sequence[Path], message: str) -> None:
        self._queue.put((files, message))

    def wait(self, limit_s: float, stop_requested: Callable[[], bool] = lambda: False) -> bool:
        """Until everything is uploaded: True. What is not by then is given up, and said how to do later."""
        deadline = time.monotonic() + limit_s
        while self._queue.unfinished_tasks and self._thread.is_alive():
            if time.monotonic() > deadline or stop_requested():
                self._give_up(
                    f"not within {limit_s:.0f} s" if time.monotonic() > deadline else "stopped"
                )
                self._closed.set()
                return False
            time.sleep(0.05)
        return not self.failure

    def close(self) -> None:
        """At the end of the process; what is still waiting is told."""
        if self._queue.unfinished_tasks and not self.failure:
            self._give_up("the run ended before")
        self._closed.set()

    def _process_queue(self) -> None:
        disable_progress_bars()
        while True:
            files, message = self._queue.get()
            self._upload_with_retries(files, message)
            self._queue.task_done()

    def _upload_with_retries(self, files: Sequence[Path], message: str) -> None:
        self._non_retryable = False  # by then somebody may have logged in
        for pause_s in (*self._retry_delays_s, None):
            why = self._upload_once(files, message)
            if not why:
                self.failure = ""
            elif pause_s is None or self._non_retryable:
                self._give_up(why)
            else:
                self._emit_if_open(
                    WarningIssued(f"not published yet ({why}); once more in {pause_s:g} s")
                )
                if not self._closed.wait(pause_s):
                    continue
            return

    def _upload_once(self, files: Sequence[Path], message: str) -> str:
        """Why it failed. A hub that hangs is left to it: what is offered next must not wait for it."""
        done: queue.Queue[str] = queue.Queue()
        commit, limit = partial(self._commit, files, message), upload_timeout_s(files)
        threading.Thread(
            target=lambda: done.put(call_and_catch(commit)), name="upload", daemon=True
        ).start()
        try:
            return done.get(timeout=limit).removeprefix("SimpleTunerError: ")
        except queue.Empty:
            self._non_retryable = True
            return f"no answer to {message} in {limit:.0f} s"

    def _commit(self, files: Sequence[Path], message: str) -> None:
        here = [
            path for path in files if path.is_file()
        ]  # a checkpoint may have made room for a newer one
        names = [path.relative_to(self.run_dir).as_posix() for path in here]
        added = [
            CommitOperationAdd(name, str(path)) for name, path in zip(names, here, strict=True)
        ]
        try:
            self._ensure_repository()
            if not here:
                return
            self._api.create_commit(self.repo, added, commit_message=message)
        except HfHubHTTPError as error:
            self._non_retryable = error.response.status_code in NON_RETRYABLE_STATUS
            raise SimpleTunerError(_hub_error_message(error)) from error
        size = sum(one.upload_info.size for one in added)
        self._emit_if_open(
            NoticeIssued(
                f"published: {message}, {len(here)} files, {size / 1e6:.1f} MB, to {self.repo}"
            )
        )

    def _ensure_repository(self) -> None:
        """The repository, if it is not there."""
        if self._repository_ready:
            return
        self.repo = self._api.create_repo(self.repo, private=self._private, exist_ok=True).repo_id
        if self._private and not self._api.model_info(self.repo).private:
            self._non_retryable = True
            raise SimpleTunerError(
                f"{self.repo} is public and model_card_private is on; choose another"
            )
        self._repository_ready = True
        self._emit_if_open(
            NoticeIssued(f"publishes to {self.repo}, {'private' if self._private else 'public'}")
        )

    def _give_up(self, why: str) -> None:
        self.failure = why
        later = f"simpletuner publish {self.run_dir.name} --repo {self.repo}"
        self._emit_if_open(
            WarningIssued(f"not published ({why}). The run is not touched by that; later: {later}")
        )

    def _emit_if_open(self, event: Event) -> None:
        if not self._closed.is_set():
            self._emit(event)


@dataclass(frozen=True)
class PublishCallback:
    """What is done for others between steps: each checkpoint's LoRA, and at the end card and weights."""

    run_metadata: RunMetadata
    publisher: HubPublisher | None
    stop_requested: Callable[[], bool]

    def publish_checkpoint(self, step: int) -> None:
        folder = self.run_metadata.run_dir / f"checkpoint-{step}"
        if self.publisher is not None:
            self.publisher.enqueue(
                sorted(folder.rglob("pytorch_lora_weights*.safetensors")), folder.name
            )

    def publish_final(self, step: int) -> None:
        run_dir = self.run_metadata.run_dir
        write_model_card(run_dir, self.run_metadata, step)
        if self.publisher is not None:
            files = list_result_files(run_dir)
            self.publisher.enqueue(files, f"weights after {step} steps")
            self.publisher.wait(upload_timeout_s(files), self.stop_requested)


def upload_timeout_s(files: Sequence[Path]) -> float:
    """How long an upload of them may take, and how long they are waited for at the end."""
    return (
        UPLOAD_BASE_TIMEOUT_S
        + sum(path.stat().st_size for path in files if path.is_file()) / MIN_UPLOAD_BYTES_PER_S
    )


def _hub_error_message(error: HfHubHTTPError) -> str:
    """In one line; what to do about a refusal."""
    code = error.response.status_code
    if code in (401, 403):
        return f"the hub answers {code}: no token that may write there; `hf auth login`, or set HF_TOKEN"
    return f"the hub answers {code}: {(error.server_message or str(error)).splitlines()[0]}"
