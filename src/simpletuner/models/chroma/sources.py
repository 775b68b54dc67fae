"""Where the parts of a Chroma lie: the bundled nano, a local diffusers folder, or a hub repository."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import simpletuner.models as models_package
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import DownloadError, ModelError
from simpletuner.models.family import Source

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NANO = "nano"
FLAVOURS = {
    "base": "lodestones/Chroma1-Base",
    "hd": "lodestones/Chroma1-HD",
    "flash": "lodestones/Chroma1-Flash",
    NANO: NANO,
}
PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
SINGLE_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".sft")
ANSWER_S = 4.0  # one question before the download, so that no network is noticed in seconds


def locate(options: ModelOptions) -> Source:
    """Find or download every part. ModelError or DownloadError; no weight is read."""
    main = options.pretrained_model_name_or_path or FLAVOURS[options.model_flavour]
    separate = {
        "transformer": options.pretrained_transformer_model_name_or_path,
        "vae": options.pretrained_vae_model_name_or_path,
        "text_encoder": options.pretrained_t5_model_name_or_path,
    }
    given = {part: name for part, name in separate.items() if name}
    needed = [part for part in PARTS if part not in given]
    root, revision = _root(main, needed, options)
    folders = {part: root / part for part in needed}
    for part, name in given.items():
        parts = [part, "tokenizer"] if part == "text_encoder" else [part]
        own_root, _ = _root(name, parts, options)
        folders[part] = own_root / part if (own_root / part).is_dir() else own_root
        if part == "text_encoder":
            folders["tokenizer"] = _tokenizer(own_root, folders["tokenizer"])
    for part, folder in folders.items():
        if not folder.is_dir() or (part != "tokenizer" and not (folder / "config.json").is_file()):
            raise ModelError(
                f"{folder} is no {part} folder of a diffusers pipeline."
                f" A Chroma folder holds {', '.join(PARTS)}."
            )
    return Source(main, revision, **folders, variant=options.variant or "")


def _tokenizer(root: Path, otherwise: Path) -> Path:
    """A T5 given on its own brings its tokenizer along, beside it or inside; else the main model's serves."""
    for folder in (root / "tokenizer", root):
        if (folder / "tokenizer_config.json").is_file():
            return folder
    return otherwise


def _root(name: str, parts: list[str], options: ModelOptions) -> tuple[Path, str]:
    """(folder, commit); the commit is empty for local folders."""
    if name == NANO and not Path(name).exists():
        return Path(models_package.__path__[0]) / NANO, ""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve(), ""
    if path.suffix.lower() in SINGLE_FILES:
        raise ModelError(
            f"{name} is a single file; single files and GGUF are not read yet. Give a folder in"
            f" diffusers' layout ({', '.join(PARTS)}), or a hub repository such as {FLAVOURS['base']}."
        )
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"{name} is neither a folder that exists nor a hub repository (owner/name).")
    return download(name, parts, options.revision, options.variant or "")


def download(repo: str, parts: list[str], revision: str | None, variant: str) -> tuple[Path, str]:
    """The needed parts of a hub repository, from the hub's own cache if there; (folder, commit)."""
    weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    # Root files serve repositories that hold a single part; 18 GB single-file copies are never among them.
    patterns = ["model_index.json", "scheduler/*.json", "config.json", "tokenizer*", "spiece.model"]
    patterns += [f"{part}/{name}" for part in parts for name in ("*.json", "*.model", "*.txt", weights)]
    try:
        commit = HfApi().model_info(repo, revision=revision, timeout=ANSWER_S).sha or revision
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _refused(repo, revision, error) from None
    except (HTTPError, OSError) as error:
        return _cached(repo, patterns, revision, error)
    try:
        folder = snapshot_download(repo, revision=commit, allow_patterns=patterns, etag_timeout=ANSWER_S)
    except GatedRepoError as error:
        raise _refused(repo, revision, error) from None
    except (HTTPError, OSError) as error:
        raise DownloadError(
            f"The download of {repo} broke off ({_reason(error)}). The same command goes on."
        ) from None
    return Path(folder), Path(folder).name


def _cached(repo: str, patterns: list[str], revision: str | None, error: Exception) -> tuple[Path, str]:
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True)
    except (LocalEntryNotFoundError, HTTPError):
        raise DownloadError(
            f"{repo} is not in the hub cache and {constants.ENDPOINT} cannot be reached ({_reason(error)})."
            " Behind a blocked network set HF_ENDPOINT=https://hf-mirror.com, or give a local folder as"
            " pretrained_model_name_or_path."
        ) from None
    return Path(folder), Path(folder).name


def _refused(repo: str, revision: str | None, error: HfHubHTTPError) -> DownloadError:
    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"{repo} is gated: accept its licence on {constants.ENDPOINT}/{repo},"
            " then run `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return DownloadError(f"{repo} has no revision {revision!r}.")
    return DownloadError(f"{repo} does not exist on {constants.ENDPOINT}, or is private and needs HF_TOKEN.")


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
