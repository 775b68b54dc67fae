"""Validation prompts, image sizes, and the list of images that they give together."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.config.documents import parse_document, read_document
from simpletuner.config.jsonc import Document
from simpletuner.config.option_values import did_you_mean
from simpletuner.config.schema import DataOptions, ValidationOptions
from simpletuner.errors import ConfigError, Problem
from simpletuner.validation.prompt_library import Prompt, library_prompts

__all__ = ["ImageSpec", "Prompt", "make_image_specs", "parse_sizes", "prompt_texts", "read_prompts"]

PROMPT_FIELDS = ("prompt", "caption", "negative_prompt", "seed", "size", "adapter_strength")
MAX_STRENGTH = 10.0
MIN_SIDE_PX = 64  # of a prompt's own size, whatever the model's multiple is
SIZE_PATTERN = re.compile(r"\s*(\d{1,6})\s*(?:[xX×]\s*(\d{1,6})\s*)?")
# Characters. With the rest of the name, a file name has less than 255 bytes even when every letter
# takes four bytes in UTF-8.
MAX_ID_LENGTH = 48
MAX_SIDE_PX = 4096


@dataclass(frozen=True)
class ImageSpec:
    """One image to generate.

    Its noise depends only on seed and size, so `generate --seed` can generate it again. number:
    counts the images of the same prompt and size from 0. size_px: (width, height). start: the name
    of the image that it starts from, at the noise level `denoise`; "" is none.
    """

    prompt: Prompt
    number: int
    size_px: tuple[int, int]
    seed: int
    start: str = ""
    denoise: float = 1.0

    @property
    def stem(self) -> str:
        return f"{self.prompt.id}-{self.number}-{self.size_px[0]}x{self.size_px[1]}"


def read_prompts(
    options: ValidationOptions, base_dir: Path, trigger: str | None = None
) -> tuple[Prompt, ...]:
    """Return validation_prompt (id "validation"), then those of the libraries in their order.

    The ids are unique: a prompt of user_prompt_library replaces the built-in one of its name.
    base_dir: the folder in which a relative user_prompt_library is looked up, before the working
    directory. trigger: the trigger word, for the built-in prompts about it.

    Raises ConfigError with all problems of the library at once, each with line and column.
    """
    prompts = []
    if options.validation_prompt:
        prompts.append(
            Prompt("validation", options.validation_prompt, options.validation_negative_prompt)
        )
    if options.user_prompt_library:
        negative = options.validation_negative_prompt
        prompts.extend(_read_library(options.user_prompt_library, base_dir, negative))
    if options.validation_prompt_library:
        taken = {prompt.id.casefold() for prompt in prompts}
        built_in = library_prompts(trigger, options.validation_negative_prompt)
        prompts.extend(prompt for prompt in built_in if prompt.id not in taken)
    return tuple(prompts)


def prompt_texts(prompts: Sequence[Prompt], guidance: float) -> tuple[str, ...]:
    """Return every text that must be encoded, each once; negative prompts only if they are used."""
    texts = [prompt.text for prompt in prompts]
    if guidance > 1:
        texts += [prompt.negative for prompt in prompts]
    return tuple(dict.fromkeys(texts))


def prompts_by_size(
    prompts: Sequence[Prompt], sizes: Sequence[tuple[int, int]], alignment_px: int
) -> dict[tuple[int, int], list[Prompt]]:
    """Return the prompts of each size (width, height): `sizes`, or a prompt's own, rounded."""
    groups: dict[tuple[int, int], list[Prompt]] = {size: [] for size in sizes}
    for prompt in prompts:
        own = _sides(prompt.size)
        aligned = [(_round_to(own[0], alignment_px), _round_to(own[1], alignment_px))]
        for size in aligned if prompt.size else sizes:
            groups.setdefault(size, []).append(prompt)
    return {size: members for size, members in groups.items() if members}


def make_image_specs(
    prompts: Sequence[Prompt],
    sizes: Sequence[tuple[int, int]],
    count: int,
    seed: int,
    alignment_px: int = 1,
) -> tuple[ImageSpec, ...]:
    """Return every prompt at each of its sizes, `count` times with consecutive seeds, by size."""
    return tuple(
        ImageSpec(prompt, number, size, (seed if prompt.seed is None else prompt.seed) + number)
        for size, members in prompts_by_size(prompts, sizes, alignment_px).items()
        for prompt in members
        for number in range(count)
    )


def _sides(text: str) -> tuple[int, int]:
    """Return width and height of "512" or "512x768"; (0, 0) for any other text."""
    match = SIZE_PATTERN.fullmatch(text)
    return (int(match[1]), int(match[2] or match[1])) if match else (0, 0)


def _round_to(side: int, alignment_px: int) -> int:
    return max(1, round(side / alignment_px)) * alignment_px


def parse_sizes(
    text: str | None, data: DataOptions, alignment_px: int, option: str = "validation_resolution"
) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """Return sizes (width, height), and a notice for every size that was rounded.

    text: "512", "512x768" or a comma-separated list; None for the square that is trained on. Sides
    are rounded to the nearest multiples of alignment_px.

    Raises ConfigError for a size that is not in whole pixels from alignment_px to MAX_SIDE_PX.
    """
    sizes: dict[tuple[int, int], None] = {}
    notices: list[str] = []
    problems: list[Problem] = []
    for part in (text or _default_size(data)).split(","):
        sides = _sides(part)
        if not all(alignment_px <= side <= MAX_SIDE_PX for side in sides):
            allowed = f"pixels from {alignment_px} to {MAX_SIDE_PX}, one side or WIDTHxHEIGHT"
            problems.append(Problem(option, f"{part.strip()!r} is not a size: {allowed}"))
            continue
        width, height = (_round_to(side, alignment_px) for side in sides)
        if (width, height) != sides:
            notices.append(
                f"validation images of {sides[0]}x{sides[1]} px are generated at {width}x{height}: "
                f"sides are multiples of {alignment_px}"
            )
        sizes[width, height] = None
    if problems:
        raise ConfigError(problems)
    return tuple(sizes), tuple(notices)


def _default_size(data: DataOptions) -> str:
    """Return the side of the trained square; resolution_type area counts in megapixels."""
    if data.resolution_type == "area":
        return str(round(math.sqrt(data.resolution * 1e6)))
    return str(round(data.resolution))


def _read_library(name: str, base_dir: Path, negative: str) -> list[Prompt]:
    given = Path(os.path.expanduser(name))
    candidates = (base_dir / given, given)
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        message = f"{name!r} is not a file (looked in {base_dir} and in the working directory)"
        raise ConfigError([Problem("user_prompt_library", message)])
    taken = {"validation": "validation_prompt"}
    return _library_prompts(read_document(path, str(path)), negative, taken)


def parse_edited_prompts(text: str, name: str, negative: str) -> tuple[Prompt, ...]:
    """Return the prompts of a JSON text like that of user_prompt_library, at least one.

    name: how messages call the text. negative: of a prompt without one. Raises ConfigError.
    """
    prompts = _library_prompts(parse_document(text, ".json", name), negative, {})
    if not prompts:
        raise ConfigError([Problem(name, "needs at least one prompt")])
    return tuple(prompts)


def _library_prompts(document: Document, negative: str, taken: dict[str, str]) -> list[Prompt]:
    """Return the prompts of a library. taken: file names that are in use -> by what."""
    if not isinstance(document.value, dict):
        raise ConfigError(
            [Problem(document.location_of(), 'must be an object: {"shortname": "a prompt", ...}')]
        )
    problems: list[Problem] = []
    prompts: list[Prompt] = []
    for shortname, value in document.value.items():
        file_id = safe_file_name(shortname)
        fields: Any = {"prompt": value} if isinstance(value, str) else value
        field_problems = list(_prompt_problems(fields))
        if not file_id:
            field_problems.append(((), "the name has no letter or digit, so it gives no file name"))
        elif file_id.casefold() in taken:
            other = taken[file_id.casefold()]
            field_problems.append(
                ((), f"the file name would be the same as for {other!r}; choose another name")
            )
        taken[file_id.casefold()] = shortname
        problems += [
            Problem(document.location_of((shortname, *field_path)), f"{shortname!r}: {message}")
            for field_path, message in field_problems
        ]
        if not field_problems:
            prompts.append(
                Prompt(
                    file_id,
                    fields.get("prompt", fields.get("caption")),
                    fields.get("negative_prompt", negative),
                    fields.get("seed"),
                    fields.get("size", ""),
                    float(fields.get("adapter_strength", 1.0)),
                )
            )
    if problems:
        raise ConfigError(problems)
    return prompts


def _prompt_problems(fields: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the problems of one entry of the library: (path of the field inside it, message)."""
    if not isinstance(fields, dict):
        yield (), 'must be a prompt, or {"prompt": ..., "negative_prompt": ..., "seed": ...}'
        return
    for field in sorted(fields.keys() - set(PROMPT_FIELDS)):
        hint = did_you_mean(field, PROMPT_FIELDS) or f"; allowed are {', '.join(PROMPT_FIELDS)}"
        yield (field,), f"unknown field {field!r}{hint}"
    if ("prompt" in fields) == ("caption" in fields):
        yield (), "needs the field 'prompt' (or 'caption', not both)"
    for field in ("prompt", "caption", "negative_prompt"):
        if not isinstance(fields.get(field, ""), str):
            yield (field,), f"{field} must be text, not {fields[field]!r}"
    seed = fields.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        yield ("seed",), f"seed must be a whole number, 0 or larger, not {seed!r}"
    size = fields.get("size", "")
    sides = _sides(size) if isinstance(size, str) else (0, 0)
    if size != "" and not all(MIN_SIDE_PX <= side <= MAX_SIDE_PX for side in sides):
        allowed = f'pixels from {MIN_SIDE_PX} to {MAX_SIDE_PX}, such as "512" or "512x768"'
        yield ("size",), f"size must be {allowed}, not {size!r}"
    strength = fields.get("adapter_strength", 1.0)
    is_number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not is_number or not abs(strength) <= MAX_STRENGTH:
        allowed = f"a number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}"
        yield ("adapter_strength",), f"adapter_strength must be {allowed}, not {strength!r}"


def safe_file_name(shortname: str) -> str:
    """Return the name with only letters, digits, "_", "." and "-".

    The result is never a path or the name of a hidden file; it may be empty.
    """
    name = unicodedata.normalize("NFC", shortname)
    cleaned = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
    return re.sub(r"-{2,}", "-", cleaned).strip(".-")[:MAX_ID_LENGTH].rstrip(".-")
