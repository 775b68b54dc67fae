"""Captions of an image. Text must be UTF-8; no other encoding is guessed."""

from __future__ import annotations

import re
from functools import cache

from simpletuner.config.schema import DataOptions
from simpletuner.data.caption_filters import apply_filters
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sources import SourceFile

MAX_CAPTION_BYTES = 256 << 10  # 512 tokens are about 2,500 bytes


def read_captions(
    dataset: DatasetConfig,
    image: SourceFile,
    text: SourceFile | None,
    options: DataOptions,
    from_table: tuple[str, ...] | None = None,
    seed: int = 0,
) -> tuple[str, ...]:
    """Return the alternative captions of one image; one of them is used each time it is trained.

    text: the .txt file of the same stem, None when there is none. textfile: every line that is not
    blank is an alternative; with disable_multiline_split the whole file is one. filename: the stem,
    underscores as spaces. instanceprompt, only_instance_prompt: the instance prompts. csv, jsonl,
    parquet, huggingface: from_table, which are the captions of the image's row (None where images
    have no rows). prepend_instance_prompt: every prompt before every alternative. A blank caption
    counts as missing; missing_caption decides.

    caption_filter_list is applied to all captions except instance prompts. Then come the
    variants of caption_shuffle, which stand together for each alternative; a prompt that is put
    before a caption stays first. seed: of the run, for the variants.
    """
    if dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt":
        return _add_variants(dataset, dataset.instance_prompts, seed)
    captions: tuple[str, ...] = ()
    if dataset.caption_strategy == "filename":
        captions = _caption_from_filename(image)
    elif from_table is not None:
        captions, text = from_table, None
    elif text is not None:
        captions = _captions_from_text_file(text, dataset.disable_multiline_split)
    if dataset.caption_filters:
        filtered = (apply_filters(caption, dataset.caption_filters) for caption in captions)
        captions = tuple(caption for caption in filtered if caption)
    # After the filters, which may leave nothing of a caption.
    if not captions:
        captions = _missing_caption_fallback(dataset, image, text, options.missing_caption)
    captions = _add_variants(dataset, captions, seed)
    if dataset.prepend_instance_prompt:
        return tuple(
            f"{prompt} {caption}".strip()
            for prompt in dataset.instance_prompts
            for caption in captions
        )
    return captions


def _add_variants(dataset: DatasetConfig, captions: tuple[str, ...], seed: int) -> tuple[str, ...]:
    variants = dataset.caption_variants
    if variants is None:
        return captions
    return tuple(text for caption in captions for text in variants.of_caption(caption, seed))


def caption_weights(dataset: DatasetConfig, count: int) -> tuple[float, ...]:
    """Return the weight of each of the `count` captions that read_captions returned; or none.

    The variants of an alternative share its weight, and every instance prompt has all alternatives.
    """
    weights = dataset.caption_weights
    if not weights:
        return ()
    prompted = dataset.prepend_instance_prompt and not (
        dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt"
    )
    prompts = len(dataset.instance_prompts) if prompted else 1
    variants = dataset.caption_variants
    return _spread_weights(
        weights, count, prompts, 1 if variants is None else variants.captions_per_caption
    )


@cache
def _spread_weights(
    weights: tuple[float, ...], count: int, prompts: int, variants: int
) -> tuple[float, ...]:
    """Return the weights; samples with as many captions share one tuple."""
    alternatives = count // prompts // variants
    own = [weights[min(number, len(weights) - 1)] for number in range(alternatives)]
    return tuple(weight for weight in own for _ in range(variants)) * prompts


def _caption_from_filename(image: SourceFile) -> tuple[str, ...]:
    caption = " ".join(image.stem.replace("_", " ").split())
    return (caption,) if caption else ()


def _captions_from_text_file(file: SourceFile, whole: bool) -> tuple[str, ...]:
    try:
        text = file.read_bytes(MAX_CAPTION_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        detail = f"{file.name} is not UTF-8 (byte {error.start + 1}); save it as UTF-8"
        raise UnusableFile("caption_encoding", detail) from error
    except OSError as error:
        raise UnusableFile("caption_unreadable", f"{file.name}: {error.strerror}") from error
    # ASCII text in UTF-16 is valid UTF-8, with a zero byte after each letter.
    if "\x00" in text:
        raise UnusableFile(
            "caption_encoding", f"{file.name} has zero bytes (UTF-16?); save it as UTF-8"
        )
    # Only these: str.splitlines would also split at form feeds and at Unicode's separators.
    text = re.sub(r"\r\n|\r", "\n", text)
    alternatives = [text] if whole else text.split("\n")
    return tuple(caption for caption in (line.strip() for line in alternatives) if caption)


def _missing_caption_fallback(
    dataset: DatasetConfig, image: SourceFile, text: SourceFile | None, policy: str
) -> tuple[str, ...]:
    if policy == "empty":
        return ("",)
    if policy == "filename" and (captions := _caption_from_filename(image)):
        return captions
    if text is not None:
        missing = f"{text.name} is empty"
    elif dataset.table is not None:
        missing = "its row has no caption"
    elif dataset.caption_table is not None:
        missing = f"{dataset.caption_table.path.name} has no caption for it"
    elif dataset.caption_strategy == "textfile":
        missing = f"there is no {image.stem}.txt next to it"
    else:
        missing = "its name gives no caption"
    raise UnusableFile("caption_dropped" if policy == "drop" else "caption_missing", missing)
