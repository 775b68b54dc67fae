"""Where the parts of a Chroma lie: the bundled nano, a local diffusers folder, or a hub repository."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import simpletuner.models as models_package
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import DiskFull, DownloadError, ModelError
from simpletuner.models.chroma.weights import STEM, read_config
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
STEMS = {"transformer": STEM, "vae": STEM, "text_encoder": "model"}
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json")  # spiece.model alone does not say whose it is
SINGLE_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".sft")
ANSWER_S = 4.0  # one question before the download, so that no network is noticed in seconds


def locate(options: ModelOptions) -> Source:
    """Find or download every part. ModelError or DownloadError; no weight is read.

    A part given on its own is taken from its folder or repository; the others from the main one, which is
    neither asked for nor downloaded when it has nothing to add. `revision` is the main one's.
    """
    main = options.pretrained_model_name_or_path or FLAVOURS[options.model_flavour]
    separate = {
        "transformer": options.pretrained_transformer_model_name_or_path,
        "vae": options.pretrained_vae_model_name_or_path,
        "text_encoder": options.pretrained_t5_model_name_or_path,
    }
    variant, revision = options.variant or "", ""
    folders: dict[str, Path] = {}
    for part, name in separate.items():
        if name:
            root, _ = root_folder(
                name, [part, "tokenizer"] if part == "text_encoder" else [part], None, variant
            )
            folders[part] = part_folder(part, root)
            if part == "text_encoder" and (tokenizer := _tokenizer(root)):
                folders["tokenizer"] = tokenizer
    if needed := [part for part in PARTS if part not in folders]:
        if main == NANO and not (options.pretrained_model_name_or_path and Path(NANO).is_dir()):
            root = Path(models_package.__path__[0]) / NANO
        else:
            root, revision = root_folder(main, needed, options.revision, variant)
        folders |= {part: root / part for part in needed}
    for part, folder in folders.items():
        _check(part, folder)
    return Source(main, revision, **folders, variant=variant)


def part_folder(part: str, root: Path) -> Path:
    """Inside a pipeline's folder, or the folder itself."""
    folder = root / part if (root / part).is_dir() else root
    _check(part, folder)
    return folder


def _check(part: str, folder: Path) -> None:
    if not folder.is_dir() or (part != "tokenizer" and not (folder / "config.json").is_file()):
        raise ModelError(
            f"{folder} is no {part} folder of a diffusers pipeline. A Chroma folder holds {', '.join(PARTS)}."
        )


def _tokenizer(root: Path) -> Path | None:
    """A T5 given on its own may bring its tokenizer along, beside it or inside."""
    for folder in (root / "tokenizer", root):
        if any((folder / name).is_file() for name in TOKENIZERS):
            return folder
    return None


def root_folder(name: str, parts: list[str], revision: str | None, variant: str) -> tuple[Path, str]:
    """(folder, commit); the commit is empty for local folders."""
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
    return download(name, parts, revision, variant)


def wanted(parts: list[str], variant: str) -> tuple[list[str], list[str]]:
    """Names of the small files that describe the parts, and of the weights of this variant alone.

    A repository asked for one part may hold it at its root, beside 18 GB copies that are never wanted.
    """
    models = [part for part in parts if part in STEMS]
    stems = [f"{part}/{STEMS[part]}" for part in models]
    small = ["model_index.json", "scheduler/*.json"]
    small += [f"{part}/{name}" for part in parts for name in ("*.json", "*.model", "*.txt")]
    if len(models) == 1:
        stems.append(STEMS[models[0]])
        small += ["config.json", "*.safetensors.index*.json"]
        small += [*TOKENIZERS, "special_tokens_map.json", "spiece.model"]
    dot = f".{variant}" if variant else ""
    ends = (f"{dot}.safetensors", f"{dot}-?????-of-?????.safetensors", f"-?????-of-?????{dot}.safetensors")
    return small, [stem + end for stem in stems for end in dict.fromkeys(ends)]


def download(repo: str, parts: list[str], revision: str | None, variant: str) -> tuple[Path, str]:
    """The needed parts of a hub repository, from the hub's own cache if there; (folder, commit).

    The transformer's config comes first: what is not Chroma is refused before gigabytes have come.
    """
    small, weights = wanted(parts, variant)
    try:
        HfApi().model_info(repo, revision=revision, timeout=ANSWER_S)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _refused(repo, revision, error) from None
    except (HTTPError, OSError) as error:
        return _cached(repo, [*small, *weights], revision, error)
    try:
        # By its name, since the cache remembers a branch only when it was asked for as one.
        folder = snapshot_download(repo, revision=revision, allow_patterns=small, etag_timeout=ANSWER_S)
        commit = Path(folder).name
        if "transformer" in parts:
            read_config(part_folder("transformer", Path(folder)))
        snapshot_download(repo, revision=commit, allow_patterns=weights, etag_timeout=ANSWER_S)
    except GatedRepoError as error:
        raise _refused(repo, revision, error) from None
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no room for {repo} in {constants.HF_HUB_CACHE}; HF_HOME chooses another disk. The same"
                " command goes on."
            ) from None
        raise DownloadError(
            f"The download of {repo} broke off ({_reason(error)}). The same command goes on."
        ) from None
    return Path(folder), commit


def _cached(repo: str, patterns: list[str], revision: str | None, error: Exception) -> tuple[Path, str]:
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True)
    except (HTTPError, OSError):
        raise DownloadError(
            f"{repo} is not wholly in the hub cache, and {constants.ENDPOINT} cannot be reached"
            f" ({_reason(error)})."
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
