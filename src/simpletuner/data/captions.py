"""What may be said about a picture. Text is UTF-8 or refused; nothing is guessed."""

from __future__ import annotations

import re
from pathlib import Path

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.rejections import UnusableFile


def read_captions(
    dataset: DatasetConfig, image: Path, text: Path | None, options: DataOptions
) -> tuple[str, ...]:
    """The alternatives of one picture; each visit uses one.

    text: the file of the same stem with .txt, None when there is none. textfile: every line that is
    not blank is an alternative; with disable_multiline_split the whole file is one. filename: the
    stem, underscores as spaces. instanceprompt, only_instance_prompt: the instance prompts.
    prepend_instance_prompt: every prompt before every alternative. A blank caption is a missing
    one: missing_caption decides.
    """
    if dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt":
        return dataset.instance_prompts
    if dataset.caption_strategy == "filename":
        said = _caption_from_filename(image)
    else:
        said = (
            _captions_from_text_file(text, dataset.disable_multiline_split)
            if text is not None
            else ()
        )
    if not said:
        said = _missing_caption_fallback(dataset, image, text, options.missing_caption)
    if dataset.prepend_instance_prompt:
        return tuple(
            f"{prompt} {caption}".strip() for prompt in dataset.instance_prompts for caption in said
        )
    return said


def _caption_from_filename(image: Path) -> tuple[str, ...]:
    caption = " ".join(image.stem.replace("_", " ").split())
    return (caption,) if caption else ()


def _captions_from_text_file(path: Path, whole: bool) -> tuple[str, ...]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{path.name} is not UTF-8 (byte {error.start + 1}); save it as UTF-8"
        raise UnusableFile("caption_encoding", where) from error
    except OSError as error:
        raise UnusableFile("caption_unreadable", f"{path.name}: {error.strerror}") from error
    if "\x00" in text:
        raise UnusableFile(
            "caption_encoding", f"{path.name} has zero bytes (UTF-16?); save it as UTF-8"
        )
    text = re.sub(r"\r\n|\r", "\n", text)
    alternatives = [text] if whole else text.split("\n")
    return tuple(said for said in (line.strip() for line in alternatives) if said)


def _missing_caption_fallback(
    dataset: DatasetConfig, image: Path, text: Path | None, policy: str
) -> tuple[str, ...]:
    if policy == "empty":
        return ("",)
    if policy == "filename" and (said := _caption_from_filename(image)):
        return said
    if text is not None:
        missing = f"{text.name} is empty"
    elif dataset.caption_strategy == "textfile":
        missing = f"no {image.stem}.txt beside it"
    else:
        missing = "its name gives no caption"
    raise UnusableFile("caption_dropped" if policy == "drop" else "caption_missing", missing)
