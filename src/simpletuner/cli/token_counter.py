"""Counting of tokens without torch: the text encoder's tokenizer where its file is at hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from simpletuner.config.paths import HUB_ID_PATTERN
from simpletuner.config.schema import ModelOptions
from simpletuner.data.caption_statistics import TokenCounter, estimate_tokens

T5_TOKENS = 512
# Repositories of the flavours, for files that are in the hub's cache already.
FLAVOUR_REPOSITORIES = {
    "base": "lodestones/Chroma1-Base",
    "hd": "lodestones/Chroma1-HD",
    "flash": "lodestones/Chroma1-Flash",
}
NANO = "nano"
TOKENIZER_FILES = ("tokenizer/tokenizer.json", "tokenizer.json")
VOCABULARY_FILES = ("tokenizer/spiece.model", "spiece.model")


def find_token_counter(options: ModelOptions) -> TokenCounter:
    """Return the counter for captions of this model; nothing is downloaded.

    The tokenizer is looked for in the folders of the options and in the cache of the hub. Where it
    is not, the counter is an estimate that says so.
    """
    limit = min(T5_TOKENS, options.tokenizer_max_length or T5_TOKENS)
    path = next(_tokenizer_paths(options), None)
    if path is not None:
        return TokenCounter(_load_counter(path), f"counted by {path}", limit)
    source = "estimated as a token per four characters: T5's tokenizer is not on this machine"
    return TokenCounter(estimate_tokens, source, limit)


def _load_counter(path: Path) -> Callable[[str], int]:
    if path.suffix == ".json":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        return lambda caption: len(tokenizer.encode(caption).ids)
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(path))
    return lambda caption: len(pieces.encode(caption)) + 1


def _tokenizer_paths(options: ModelOptions) -> Iterator[Path]:
    """Yield the tokenizer files that exist, those of the options first."""
    main = options.pretrained_model_name_or_path or options.model_flavour
    for name in filter(None, (options.pretrained_t5_model_name_or_path, main)):
        folder = Path(os.path.expanduser(name))
        folder = folder.parent if folder.is_file() else folder
        if name == NANO and not folder.is_dir():
            import simpletuner.models as models_package

            folder = Path(models_package.__path__[0]) / NANO
        if folder.is_dir():
            for file in (*TOKENIZER_FILES, *VOCABULARY_FILES):
                if (folder / file).is_file():
                    yield folder / file
            continue
        repository = FLAVOUR_REPOSITORIES.get(name, name)
        if HUB_ID_PATTERN.fullmatch(repository):
            yield from _cached_files(repository)


def _cached_files(repository: str) -> Iterator[Path]:
    from huggingface_hub import try_to_load_from_cache

    for file in (*TOKENIZER_FILES, *VOCABULARY_FILES):
        cached_path = try_to_load_from_cache(repository, file)
        if isinstance(cached_path, str):
            yield Path(cached_path)
