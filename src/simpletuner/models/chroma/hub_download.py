"""The needed files of a hub repository, by the hub's own library and into its own cache."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects

from simpletuner.errors import DiskFull, DownloadError
from simpletuner.events.event_types import Emit
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.models.chroma.weights import WEIGHTS_STEMS, read_transformer_config

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
)  # spiece.model alone does not say whose it is
HUB_TIMEOUT_S = 4.0  # one question before the download, so that no network is noticed in seconds
PROGRESS_INTERVAL_S = 0.5  # how often the growth of the cache is looked at
MB = 1_000_000
STATUS_REASONS = {
    401: "it does not accept the token in HF_TOKEN or of `hf auth login` (401)",
    403: "it refuses this token (403)",
    429: "it has had too many requests and asks to wait (429); a token in HF_TOKEN is allowed more",
}


def file_patterns(parts: list[str], variant: str) -> tuple[list[str], list[str]]:
    """Names of the small files that describe the parts, and of the weights of this variant alone.

    A repository asked for one part may hold it at its root, beside 18 GB copies that are never wanted.
    """
    models = [part for part in parts if part in WEIGHTS_STEMS]
    stems = [f"{part}/{WEIGHTS_STEMS[part]}" for part in models]
    small = ["model_index.json", "scheduler/*.json"]
    small += [f"{part}/{name}" for part in parts for name in ("*.json", "*.model", "*.txt")]
    if len(models) == 1:
        stems.append(WEIGHTS_STEMS[models[0]])
        small += ["config.json", "*.safetensors.index*.json"]
        small += [*TOKENIZER_FILES, "special_tokens_map.json", "spiece.model"]
    dot = f".{variant}" if variant else ""
    ends = (
        f"{dot}.safetensors",
        f"{dot}-?????-of-?????.safetensors",
        f"-?????-of-?????{dot}.safetensors",
    )
    return small, [stem + end for stem in stems for end in dict.fromkeys(ends)]


def download_components(
    repo: str, parts: list[str], revision: str | None, variant: str, emit: Emit
) -> tuple[Path, str]:
    """The needed parts of a hub repository, from the hub's own cache if there; (folder, commit).

    The transformer's config comes first: what is not Chroma is refused before gigabytes have come.
    """
    small, weights = file_patterns(parts, variant)
    try:
        info = HfApi().model_info(
            repo, revision=revision, timeout=HUB_TIMEOUT_S, files_metadata=True
        )
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _to_download_error(repo, revision, error) from None
    except (HTTPError, OSError) as error:
        return _load_from_hub_cache(repo, [*small, *weights], revision, error)
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    disable_progress_bars()  # ours are events
    try:
        # By its name, since the cache remembers a branch only when it was asked for as one.
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=small, etag_timeout=HUB_TIMEOUT_S
            )
        )
        commit = folder.name
        if "transformer" in parts:
            nested = folder / "transformer"
            read_transformer_config(nested if nested.is_dir() else folder)
        needed = list(filter_repo_objects(sizes, allow_patterns=weights))
        absent = {
            name: sizes[name]
            for name in needed
            if not isinstance(try_to_load_from_cache(repo, name, revision=commit), str)
        }
        if absent:
            with _report_progress(repo, sum(absent.values()), emit):
                snapshot_download(
                    repo, revision=commit, allow_patterns=needed, etag_timeout=HUB_TIMEOUT_S
                )
    except GatedRepoError as error:
        raise _to_download_error(repo, revision, error) from None
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(repo, "no room") from None
        raise DownloadError(
            f"The download of {repo} broke off ({_first_line(error)}). The same command goes on."
        ) from None
    # The library hands back what the cache has when the hub stops answering.
    if lost := [name for name in needed if not (folder / name).is_file()]:
        raise DownloadError(
            f"The download of {repo} broke off before {lost[0]}. The same command goes on."
        )
    return folder, commit


@contextmanager
def _report_progress(repo: str, total: int, emit: Emit) -> Iterator[None]:
    """Progress by the growth of the cache, whatever it is that writes there. DiskFull before it begins."""
    blobs = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "blobs")
    free = shutil.disk_usage(next(place for place in blobs.parents if place.exists())).free
    if total > free:  # what a broken download has left, the library does not go on with
        raise _disk_full(
            repo, f"{total / 1e9:.1f} GB are to come, there is room for {free / 1e9:.1f} GB"
        )
    begun = _total_bytes(blobs.glob("*"))
    done = threading.Event()
    with StageReporter(emit, f"download {repo}", total // MB, "MB") as stage:

        def look() -> None:
            grown = (_total_bytes(blobs.glob("*")) - begun) // MB
            stage.advance(max(0, min(grown, total // MB) - stage.done))

        def watch() -> None:
            while not done.wait(PROGRESS_INTERVAL_S):
                look()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            look()


def _total_bytes(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # it got its name in this moment
            continue
    return total


def _disk_full(repo: str, reason: str) -> DiskFull:
    return DiskFull(
        f"{reason} for {repo} in {constants.HF_HUB_CACHE}; HF_HOME chooses another disk. The same command"
        " goes on."
    )


def _load_from_hub_cache(
    repo: str, patterns: list[str], revision: str | None, error: Exception
) -> tuple[Path, str]:
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, local_files_only=True
        )
    except (HTTPError, OSError):
        raise DownloadError(
            f"{repo} is not wholly in the hub cache, and {_unreachable_reason(error)}"
        ) from None
    return Path(folder), Path(folder).name


def _unreachable_reason(error: Exception) -> str:
    """Why the hub did not tell, and the way out."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status in STATUS_REASONS:
        return f"{constants.ENDPOINT} does not answer: {STATUS_REASONS[status]}."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids asking for it. Unset it, or give a local folder."
    return (
        f"{constants.ENDPOINT} cannot be reached ({_first_line(error)}). Behind a blocked network set"
        " HF_ENDPOINT=https://hf-mirror.com, or give a local folder as pretrained_model_name_or_path."
    )


def _to_download_error(repo: str, revision: str | None, error: HfHubHTTPError) -> DownloadError:
    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"{repo} is gated: accept its licence on {constants.ENDPOINT}/{repo},"
            " then run `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return DownloadError(f"{repo} has no revision {revision!r}.")
    return DownloadError(
        f"{repo} does not exist on {constants.ENDPOINT}, or is private and needs HF_TOKEN."
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
