"""Upload to the Hugging Face Hub while a run trains.

Failed uploads are retried with growing delays and reported by events; they never stop the run.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import disable_progress_bars

from simpletuner.config.schema import PublishingOptions
from simpletuner.errors import SimpleTunerError
from simpletuner.events.event_types import Emit, Event, NoticeIssued, WarningIssued
from simpletuner.events.sinks import call_and_catch
from simpletuner.training.model_card import list_card_images

RETRY_DELAYS_S = (5.0, 20.0, 60.0, 180.0, 600.0)
# An upload may take this long, plus the time for its bytes at this rate.
UPLOAD_BASE_TIMEOUT_S = 600.0
MIN_UPLOAD_BYTES_PER_S = 1e6
NON_RETRYABLE_STATUS = (400, 401, 403, 404, 409)  # a retry would get the same answer
RESULT_PATTERNS = ("*.safetensors", "ema/*.safetensors", "transformer/*", "transformer_ema/*")


def list_result_files(run_dir: Path) -> list[Path]:
    """Return the files of a finished run to publish: weights, the model card and its images.

    No other file is uploaded, because others contain paths of this machine.
    """
    files = [path for pattern in RESULT_PATTERNS for path in sorted(run_dir.glob(pattern))]
    card = run_dir / "README.md"
    if card.is_file():
        files += [card, *(run_dir / name for name in list_card_images(card))]
    return [path for path in files if path.is_file() and not path.name.startswith(".")]


def repository_name(options: PublishingOptions, run_dir: Path) -> str:
    """Return hub_model_id, or the name of the run folder in the characters that the hub allows."""
    return (
        options.hub_model_id
        or re.sub(r"[^\w.-]+|--+|\.\.+", "-", run_dir.name).strip("-.")
        or "chroma"
    )


class HubPublisher:
    """Uploads in order on one thread, each enqueued set of files as one commit.

    failure: why the last upload failed, or "". private: for a repository that is created; nothing
    is uploaded to an existing public one unless private is False. api: uses the token of `hf auth
    login` or HF_TOKEN. The repository is created at once, so that a refusal is known at the start.
    """

    def __init__(
        self,
        run_dir: Path,
        repo: str,
        private: bool,
        emit: Emit,
        api: HfApi | None = None,
        retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
    ) -> None:
        self.run_dir = run_dir
        self.repo = repo
        self.failure = ""
        self._private = private
        self._emit = emit
        self._retry_delays_s = retry_delays_s
        self._api = api or HfApi()
        self._repository_ready = False
        self._non_retryable = False
        self._queue: queue.Queue[tuple[Sequence[Path], str]] = queue.Queue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._process_queue, name="publish", daemon=True)
        self.enqueue((), "the repository")
        self._thread.start()

    def enqueue(self, files: Sequence[Path], message: str) -> None:
        """Upload the files as one commit. message: of the commit."""
        self._queue.put((files, message))

    def publish_results(self, step: int, stop_requested: Callable[[], bool]) -> None:
        """Upload the results of the run, and wait for it as long as that may take."""
        files = list_result_files(self.run_dir)
        self.enqueue(files, f"weights after {step} steps")
        self.wait(upload_timeout_s(files), stop_requested)

    def wait(self, limit_s: float, stop_requested: Callable[[], bool] = lambda: False) -> bool:
        """Wait until everything is uploaded, and return whether it was.

        After limit_s seconds, or when a stop is requested, the rest is given up; an event says how
        to upload it later.
        """
        deadline = time.monotonic() + limit_s
        while self._queue.unfinished_tasks and self._thread.is_alive():
            if time.monotonic() > deadline or stop_requested():
                self._give_up(
                    f"not finished after {limit_s:.0f} s"
                    if time.monotonic() > deadline
                    else "stopped"
                )
                self._closed.set()
                return False
            time.sleep(0.05)
        return not self.failure

    def close(self) -> None:
        """Give up what is not uploaded yet, at the end of the process."""
        if self._queue.unfinished_tasks and not self.failure:
            self._give_up("the run ended before that")
        self._closed.set()

    def _process_queue(self) -> None:
        disable_progress_bars()
        while True:
            files, message = self._queue.get()
            self._upload_with_retries(files, message)
            self._queue.task_done()

    def _upload_with_retries(self, files: Sequence[Path], message: str) -> None:
        self._non_retryable = False  # the user may have logged in since then
        for delay_s in (*self._retry_delays_s, None):
            why = self._upload_once(files, message)
            if not why:
                self.failure = ""
            elif delay_s is None or self._non_retryable:
                self._give_up(why)
            else:
                self._emit_if_open(
                    WarningIssued(f"upload failed ({why}); next attempt in {delay_s:g} s")
                )
                if not self._closed.wait(delay_s):
                    continue
            return

    def _upload_once(self, files: Sequence[Path], message: str) -> str:
        """Upload once; return why it failed, or "".

        The upload runs on a thread of its own: one that hangs is abandoned after the time limit, so
        that the next upload does not wait for it.
        """
        done: queue.Queue[str] = queue.Queue()
        commit, limit = partial(self._commit, files, message), upload_timeout_s(files)
        threading.Thread(
            target=lambda: done.put(call_and_catch(commit)), name="upload", daemon=True
        ).start()
        try:
            return done.get(timeout=limit).removeprefix("SimpleTunerError: ")
        except queue.Empty:
            self._non_retryable = True
            return f"no answer from the hub in {limit:.0f} s ({message})"

    def _commit(self, files: Sequence[Path], message: str) -> None:
        # A checkpoint may have been deleted since it was enqueued.
        existing = [path for path in files if path.is_file()]
        additions = [
            CommitOperationAdd(path.relative_to(self.run_dir).as_posix(), str(path))
            for path in existing
        ]
        try:
            self._ensure_repository()
            if not existing:
                return
            self._api.create_commit(self.repo, additions, commit_message=message)
        except HfHubHTTPError as error:
            self._non_retryable = error.response.status_code in NON_RETRYABLE_STATUS
            raise SimpleTunerError(_hub_error_message(error)) from error
        size = sum(addition.upload_info.size for addition in additions)
        files_text = "1 file" if len(existing) == 1 else f"{len(existing)} files"
        self._emit_if_open(
            NoticeIssued(f"published: {message}, {files_text}, {size / 1e6:.1f} MB, to {self.repo}")
        )

    def _ensure_repository(self) -> None:
        """Create the repository if it does not exist; refuse a public one when private is set."""
        if self._repository_ready:
            return
        self.repo = self._api.create_repo(self.repo, private=self._private, exist_ok=True).repo_id
        if self._private and not self._api.model_info(self.repo).private:
            self._non_retryable = True
            raise SimpleTunerError(
                f"{self.repo} is a public repository and model_card_private is true; choose "
                "another hub_model_id, or set model_card_private to false"
            )
        self._repository_ready = True
        self._emit_if_open(
            NoticeIssued(f"publishing to {self.repo}, {'private' if self._private else 'public'}")
        )

    def _give_up(self, why: str) -> None:
        self.failure = why
        later = f"simpletuner publish {self.run_dir.name} --repo {self.repo}"
        self._emit_if_open(
            WarningIssued(
                f"not published ({why}). The run is not affected. To upload later: {later}"
            )
        )

    def _emit_if_open(self, event: Event) -> None:
        if not self._closed.is_set():
            self._emit(event)


def upload_timeout_s(files: Sequence[Path]) -> float:
    """Return how long an upload of these files may take; the end of a run waits as long."""
    return (
        UPLOAD_BASE_TIMEOUT_S
        + sum(path.stat().st_size for path in files if path.is_file()) / MIN_UPLOAD_BYTES_PER_S
    )


def _hub_error_message(error: HfHubHTTPError) -> str:
    """Return the answer of the hub in one line, with what to do about a refusal."""
    code = error.response.status_code
    if code in (401, 403):
        return (
            f"the hub answered {code}: the token may not write there, or there is none. Run "
            "`hf auth login`, or set HF_TOKEN"
        )
    return f"the hub answered {code}: {(error.server_message or str(error)).splitlines()[0]}"
