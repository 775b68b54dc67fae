"""Datasets of the Hugging Face Hub, read where they are: parquet, tables, tar files or images.

huggingface_hub lists the repository at one commit, and its files are downloaded like all others.
The package `datasets` is not used: it would convert every file to a second copy on disk, and a
stream of it has no random access, which the order of a training needs.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, urlsplit

from simpletuner.data.dataset_config import HubLocation
from simpletuner.data.http_transport import HttpTransport
from simpletuner.data.image_suffixes import IMAGE_SUFFIXES
from simpletuner.data.listing import ListedFile, Lister, Page, RemoteFolder, version_number
from simpletuner.data.remote_file import RemoteFile
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.transports import TransferError
from simpletuner.errors import DataError
from simpletuner.events.event_types import Emit

PARQUET_REVISION = "refs/convert/parquet"  # made by the hub for datasets in other formats
SPLIT_WORDS = ("train", "validation", "valid", "val", "dev", "test", "eval")
TABLE_FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".csv": "csv"}
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class HubFiles:
    """The files of a split. kind: "rows" of tables, "tars" or "images".

    folder: lists all files of the repository at the commit. tables: (path, file, format), in the
    order of their rows.
    """

    kind: str
    folder: RemoteFolder
    tables: tuple[tuple[str, RemoteFile, str], ...] = ()


def find_hub_files(location: HubLocation, store: RemoteStore, emit: Emit) -> HubFiles:
    """Return the files of a split. Raises DataError for a dataset that cannot be read.

    A repository without files that can be read is read as the hub has converted it to parquet.
    """
    folder, card = _list_repository(location, location.revision or "main", store, emit)
    files = choose_files(folder, card, location)
    if files is None and not location.revision and not location.subfolder:
        folder, _ = _list_repository(location, PARQUET_REVISION, store, emit)
        prefix = f"{location.subset or 'default'}/{location.split}/"
        files = _rows(
            folder, [file for file in folder.list_files() if file.path.startswith(prefix)]
        )
    if files is None:
        raise DataError(
            f"{location.address} has no parquet files, tables, tar files or images of split "
            f"{location.split}{f' in {location.subfolder}' if location.subfolder else ''}"
        )
    return files


def choose_files(
    folder: RemoteFolder, card: Sequence[Mapping[str, Any]], location: HubLocation
) -> HubFiles | None:
    """Return the files of the split, by the card or by their names; None where there are none.

    card: the field "configs" of the dataset card: names, splits and patterns of their files.
    """
    inside = f"{location.subfolder}/" if location.subfolder else ""
    files = [
        file
        for file in folder.list_files()
        if file.path.startswith(inside) and not _is_hidden(file.path)
    ]
    chosen = _files_of_card(files, card, location)
    if chosen is None:
        chosen = _files_by_name(files, location)
    suffixes = [os.path.splitext(file.path)[1].lower() for file in chosen]
    narrowed = replace(folder, chosen=frozenset(file.path for file in chosen))
    if ".parquet" in suffixes:
        return _rows(folder, [file for file in chosen if file.path.lower().endswith(".parquet")])
    if ".tar" in suffixes:
        return HubFiles("tars", narrowed)
    tables = [file for file, suffix in zip(chosen, suffixes) if suffix in TABLE_FORMATS]
    if tables:
        return _rows(folder, tables)
    return HubFiles("images", narrowed) if IMAGE_SUFFIXES.intersection(suffixes) else None


def _rows(folder: RemoteFolder, files: Sequence[ListedFile]) -> HubFiles | None:
    tables = tuple(
        (file.path, folder.file(file), TABLE_FORMATS[os.path.splitext(file.path)[1].lower()])
        for file in files
        if os.path.splitext(file.path)[1].lower() in TABLE_FORMATS
    )
    return HubFiles("rows", folder, tables) if tables else None


def _files_of_card(
    files: Sequence[ListedFile], card: Sequence[Mapping[str, Any]], location: HubLocation
) -> list[ListedFile] | None:
    """Return the files that the card names for the subset and split; None without a card."""
    wanted = location.subset or "default"
    named = [config for config in card if config.get("config_name", "default") == wanted]
    config = (named or ([card[0]] if card and not location.subset else [{}]))[0]
    patterns = []
    for entry in _as_list(config.get("data_files")):
        split = entry.get("split", "train") if isinstance(entry, Mapping) else "train"
        paths = entry.get("path") if isinstance(entry, Mapping) else entry
        if split == location.split:
            patterns += [path for path in _as_list(paths) if isinstance(path, str)]
    matching = [file for file in files if any(_matches(file.path, pattern) for pattern in patterns)]
    return matching or None


def _files_by_name(files: Sequence[ListedFile], location: HubLocation) -> list[ListedFile]:
    """Return the files whose path names the split, or no split at all where it is "train"."""
    if location.subset:
        files = [file for file in files if location.subset in file.path.split("/")]
    split = re.compile(_word_pattern([location.split]))
    named = [file for file in files if split.search(file.path)]
    if named or location.split != "train":
        return named
    other = re.compile(_word_pattern([word for word in SPLIT_WORDS if word != "train"]))
    return [file for file in files if not other.search(file.path)]


def _word_pattern(words: Sequence[str]) -> str:
    return rf"(^|[/_.\-])({'|'.join(map(re.escape, words))})([/_.\-]|$)"


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern.removeprefix("./").replace("**/", "*"))


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [{"split": split, "path": path} for split, path in value.items()]
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _list_repository(
    location: HubLocation, revision: str, store: RemoteStore, emit: Emit
) -> tuple[RemoteFolder, list[Mapping[str, Any]]]:
    """List a repository at the commit of the revision; return it and "configs" of its card."""
    from huggingface_hub import HfApi, get_token

    api = HfApi()
    repository, endpoint = location.repository, api.endpoint
    # Sent to the hub's own host only; files are stored on other hosts.
    token = get_token()
    folder = RemoteFolder(
        address=location.address,
        identity=f"hub {endpoint} {repository} {revision}",
        transport=HttpTransport(
            {"Authorization": f"Bearer {token}"} if token else {}, urlsplit(endpoint).netloc
        ),
        store=store,
        locate=str,
        lister=lambda: _RepositoryLister(api, repository, revision),
        emit=emit,
        in_parts=location.streaming,
    )
    pages = folder.list_pages()
    commit, card = pages[0].follow_up
    # At the commit, so that a change of the repository during the run has no effect.
    base = f"{endpoint}/datasets/{repository}/resolve/{commit}"
    listed = replace(
        folder, locate=lambda path: f"{base}/{quote(path)}", listed=tuple(pages[0].files)
    )
    return listed, json.loads(card)


class _RepositoryLister(Lister):
    """All files of a repository as one page; huggingface_hub follows the pages of the server."""

    def __init__(self, api: Any, repository: str, revision: str) -> None:
        self._api, self._repository, self._revision = api, repository, revision

    def next_page(self) -> Page:
        with _hub_errors():
            info = self._api.dataset_info(self._repository, revision=self._revision)
            entries = self._api.list_repo_tree(
                self._repository, recursive=True, revision=info.sha, repo_type="dataset"
            )
            files = []
            for entry in entries:
                size = vars(entry).get("size")  # folders have none
                if size is not None:
                    # Both change with the content, which is what a version must do.
                    tag = entry.lfs.sha256 if entry.lfs else entry.blob_id
                    files.append(ListedFile(entry.path, size, version_number(tag)))
        card = info.card_data.to_dict() if info.card_data else {}
        return Page(tuple(sorted(files)), (str(info.sha), json.dumps(card.get("configs") or [])))

    def follow(self, page: Page) -> None:
        self.is_complete = True


@contextmanager
def _hub_errors() -> Iterator[None]:
    """Turn the errors of huggingface_hub into TransferError. Their texts may hold addresses."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        reason = "it is gated: accept its terms on its page, and set HF_TOKEN"
        raise TransferError(reason, permanent=True) from error
    except RevisionNotFoundError as error:
        raise TransferError("it has no such revision", permanent=True) from error
    except RepositoryNotFoundError as error:
        reason = "there is no such dataset, or it is private and HF_TOKEN is not set"
        raise TransferError(reason, permanent=True) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        transient = status in (0, *TRANSIENT_STATUSES)
        raise TransferError(f"HTTP {status} of the hub", permanent=not transient) from error
    except OfflineModeIsEnabled as error:
        raise TransferError("HF_HUB_OFFLINE is set", permanent=False, offline=True) from error
    except (OSError, ValueError) as error:
        raise TransferError(f"{type(error).__name__} of the hub", permanent=False) from error
