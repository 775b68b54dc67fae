"""Download the needed files of a hub repository into the hub library's own cache."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    disable_progress_bars,
    filter_repo_objects,
)

from simpletuner.errors import DiskFull, DownloadError
from simpletuner.events.event_types import Emit
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.models.weights.model_format import TOKENIZER_FILES, ModelFormat

HUB_TIMEOUT_S = 4.0  # of the request before the download; finds a missing network quickly
PROGRESS_INTERVAL_S = 0.5  # how often the size of the cache is measured
MB = 1_000_000
STATUS_REASONS = {
    401: "it does not accept the token of HF_TOKEN or `hf auth login` (401)",
    403: "it refuses access with this token (403)",
    429: "it received too many requests (429); wait, or set HF_TOKEN for a higher limit",
}


def file_patterns(
    parts: list[str], variant: str, model: ModelFormat
) -> tuple[list[str], list[str]]:
    """Return the patterns of the small files of these components, and of their weights.

    Only weights of this variant match. A repository that is used for one component may hold it at
    its root, next to 18 GB copies that are never downloaded.
    """
    with_weights = [part for part in parts if part in model.components]
    stems = [f"{part}/{model.components[part].weights_stem}" for part in with_weights]
    small = ["model_index.json", "scheduler/*.json"]
    small += [f"{part}/{name}" for part in parts for name in ("*.json", "*.model", "*.txt")]
    if len(with_weights) == 1:
        stems.append(model.components[with_weights[0]].weights_stem)
        small += ["config.json", "*.safetensors.index*.json"]
        small += [*TOKENIZER_FILES, "special_tokens_map.json", "spiece.model"]
    dot = f".{variant}" if variant else ""
    endings = (
        f"{dot}.safetensors",
        f"{dot}-?????-of-?????.safetensors",
        f"-?????-of-?????{dot}.safetensors",
    )
    return small, [stem + ending for stem in stems for ending in dict.fromkeys(endings)]


def download_components(
    repo: str,
    parts: list[str],
    revision: str | None,
    variant: str,
    model: ModelFormat,
    check_transformer: Callable[[Path], object],
    emit: Emit,
) -> tuple[Path, str]:
    """Download the components that are not in the hub's cache yet; return (folder, commit).

    check_transformer: reads the transformer's config in its folder and raises for another model. It
    is called before gigabytes of weights are downloaded.
    """
    small, weights = file_patterns(parts, variant, model)

    def check(folder: Path) -> None:
        if "transformer" in parts:
            nested = folder / "transformer"
            check_transformer(nested if nested.is_dir() else folder)

    return download_files(repo, small, weights, revision, check, emit)


def download_files(
    repo: str,
    small: list[str],
    weights: list[str],
    revision: str | None,
    check: Callable[[Path], None],
    emit: Emit,
) -> tuple[Path, str]:
    """Download what matches the patterns and is not in the hub's cache; return (folder, commit).

    small: patterns of configuration files, which are downloaded first. check: raises for a folder
    of the wrong model; it is called before the weights are downloaded.
    """
    try:
        info = HfApi().model_info(
            repo, revision=revision, timeout=HUB_TIMEOUT_S, files_metadata=True
        )
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _to_download_error(repo, revision, error) from None
    except (HTTPError, OSError) as error:
        return _load_from_hub_cache(repo, [*small, *weights], revision, error)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    disable_progress_bars()  # progress is reported by events
    try:
        # Requested by the branch's name, because only then does the cache remember the branch.
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=small, etag_timeout=HUB_TIMEOUT_S
            )
        )
        commit = folder.name
        check(folder)
        needed = list(filter_repo_objects(sizes, allow_patterns=weights))
        _download_weights(repo, commit, {name: sizes[name] for name in needed}, emit)
    except GatedRepoError as error:
        raise _to_download_error(repo, revision, error) from None
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(repo, "no disk space left") from None
        raise DownloadError(
            f"The download of {repo} was interrupted ({_first_line(error)}). Run the same command"
            " again to resume."
        ) from None
    # When the hub stops answering, the library returns the incomplete folder of the cache.
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise DownloadError(
            f"The download of {repo} was interrupted before {missing[0]}. Run the same command"
            " again to resume."
        )
    return folder, commit


def _download_weights(repo: str, commit: str, sizes: dict[str, int], emit: Emit) -> None:
    """Download the weight files that the cache lacks. sizes: bytes of every needed file."""
    absent = {
        name: size
        for name, size in sizes.items()
        if not isinstance(try_to_load_from_cache(repo, name, revision=commit), str)
    }
    if absent:
        with _report_progress(repo, sum(absent.values()), emit):
            snapshot_download(
                repo, revision=commit, allow_patterns=list(sizes), etag_timeout=HUB_TIMEOUT_S
            )


@contextmanager
def _report_progress(repo: str, total: int, emit: Emit) -> Iterator[None]:
    """Report progress by the growth of the cache folder, however the library writes there.

    Raises DiskFull before the download when there is not enough space.
    """
    blobs = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "blobs")
    free = shutil.disk_usage(next(place for place in blobs.parents if place.exists())).free
    # The library does not resume partial files of an interrupted download, so they do not count.
    if total > free:
        raise _disk_full(
            repo, f"the download needs {total / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        )
    initial_bytes = _total_bytes(blobs.glob("*"))
    finished = threading.Event()
    with StageReporter(emit, f"download {repo}", total // MB, "MB") as stage:

        def report() -> None:
            grown = (_total_bytes(blobs.glob("*")) - initial_bytes) // MB
            stage.advance(max(0, min(grown, total // MB) - stage.done))

        def watch() -> None:
            while not finished.wait(PROGRESS_INTERVAL_S):
                report()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
            report()


def _total_bytes(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # it was renamed in the meantime
            continue
    return total


def _disk_full(repo: str, reason: str) -> DiskFull:
    return DiskFull(
        f"Cannot download {repo} to {constants.HF_HUB_CACHE}: {reason}. Free disk space, or set"
        " HF_HOME to another disk, and run the same command again."
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
            f"{repo} is not completely in the hub cache, and {_unreachable_reason(error)}"
        ) from None
    return Path(folder), Path(folder).name


def _unreachable_reason(error: Exception) -> str:
    """Explain why the hub could not be used, and what to do."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status in STATUS_REASONS:
        return f"{constants.ENDPOINT} refused the request: {STATUS_REASONS[status]}."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it, or give a local folder."
    return (
        f"{constants.ENDPOINT} cannot be reached ({_first_line(error)}). Behind a blocked"
        " network set"
        " HF_ENDPOINT=https://hf-mirror.com, or give a local folder instead."
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
