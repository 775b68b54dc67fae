"""What validation draws: prompts, sizes, and the list of pictures they make together."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.config.documents import read_document
from simpletuner.config.option_values import did_you_mean
from simpletuner.config.schema import DataOptions, ValidationOptions
from simpletuner.errors import ConfigError, Problem

PROMPT_FIELDS = ("prompt", "caption", "negative_prompt", "seed")
MAX_ID_LENGTH = (
    48  # characters; with the rest of the file name under 255 bytes even in four-byte letters
)
MAX_SIDE_PX = 4096


@dataclass(frozen=True)
class Prompt:
    """One thing to draw. id: unique, safe as the start of a file name. seed: None = the run's."""

    id: str
    text: str
    negative: str = ""
    seed: int | None = None


@dataclass(frozen=True)
class ImageSpec:
    """One picture to draw. seed alone addresses its noise, so `generate --seed` can draw it again.

    number: counts pictures of the same prompt and size from 0. size_px: (width, height).
    """

    prompt: Prompt
    number: int
    size_px: tuple[int, int]
    seed: int

    @property
    def stem(self) -> str:
        return f"{self.prompt.id}-{self.number}-{self.size_px[0]}x{self.size_px[1]}"


def read_prompts(options: ValidationOptions, base_dir: Path) -> tuple[Prompt, ...]:
    """validation_prompt first (id "validation"), then the library in its order; ids are unique.

    base_dir: the folder in which a relative user_prompt_library is looked up before the working directory.
    Refuses with ConfigError, every problem of the library at once, each with line and column.
    """
    prompts = []
    if options.validation_prompt:
        prompts.append(
            Prompt("validation", options.validation_prompt, options.validation_negative_prompt)
        )
    if options.user_prompt_library:
        negative = options.validation_negative_prompt
        prompts.extend(_read_library(options.user_prompt_library, base_dir, negative))
    return tuple(prompts)


def prompt_texts(prompts: Sequence[Prompt], guidance: float) -> tuple[str, ...]:
    """Every text that must be encoded to draw the prompts, each once; negatives only where used."""
    texts = [prompt.text for prompt in prompts]
    if guidance > 1:
        texts += [prompt.negative for prompt in prompts]
    return tuple(dict.fromkeys(texts))


def make_image_specs(
    prompts: Sequence[Prompt], sizes: Sequence[tuple[int, int]], count: int, seed: int
) -> tuple[ImageSpec, ...]:
    """Every prompt at every size, `count` times with consecutive seeds; equal sizes are neighbours."""
    return tuple(
        ImageSpec(prompt, number, size, (seed if prompt.seed is None else prompt.seed) + number)
        for size in sizes
        for prompt in prompts
        for number in range(count)
    )


def parse_sizes(
    text: str | None, data: DataOptions, alignment_px: int, option: str = "validation_resolution"
) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """Sizes (width, height) from "512", "512x768" or a comma list; None = the square that is trained on.

    Sides become the nearest multiples of alignment_px; every change is told in the notes handed back.
    Refuses with ConfigError what is not whole pixels between alignment_px and LARGEST_SIDE_PX.
    """
    sizes: dict[tuple[int, int], None] = {}
    notes, problems = [], []
    for part in (text or _default_size(data)).split(","):
        found = re.fullmatch(r"\s*(\d{1,6})\s*(?:[xX×]\s*(\d{1,6})\s*)?", part)
        sides = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not all(alignment_px <= side <= MAX_SIDE_PX for side in sides):
            allowed = f"pixels from {alignment_px} to {MAX_SIDE_PX}, one side or WIDTHxHEIGHT"
            problems.append(Problem(option, f"{part.strip()!r} is not a size: {allowed}"))
            continue
        width, height = (round(side / alignment_px) * alignment_px for side in sides)
        if (width, height) != sides:
            asked = f"{sides[0]}x{sides[1]}"
            notes.append(
                f"pictures of {asked} px are drawn at {width}x{height}, multiples of {alignment_px}"
            )
        sizes[width, height] = None
    if problems:
        raise ConfigError(problems)
    return tuple(sizes), tuple(notes)


def _default_size(data: DataOptions) -> str:
    """Resolution counts megapixels when resolution_type is area, else it is the side in pixels."""
    if data.resolution_type == "area":
        return str(round(math.sqrt(data.resolution * 1e6)))
    return str(round(data.resolution))


def _read_library(name: str, base_dir: Path, negative: str) -> list[Prompt]:
    given = Path(name).expanduser()
    path = next((place for place in (base_dir / given, given) if place.is_file()), None)
    if path is None:
        what = f"{name!r} is not a file (looked in {base_dir} and in the working directory)"
        raise ConfigError([Problem("user_prompt_library", what)])
    document = read_document(path, str(path))
    if not isinstance(document.value, dict):
        raise ConfigError(
            [Problem(document.location_of(), 'must be an object: {"shortname": "a prompt", ...}')]
        )
    problems: list[Problem] = []
    prompts: list[Prompt] = []
    taken = {"validation": "validation_prompt"}
    for shortname, value in document.value.items():
        file_id = safe_file_name(shortname)
        fields: Any = {"prompt": value} if isinstance(value, str) else value
        found = list(_prompt_problems(fields))
        if not file_id:
            found.append(((), "the name has no letter or digit to call a file by"))
        elif file_id.casefold() in taken:
            other = taken[file_id.casefold()]
            found.append(((), f"its file name would be that of {other!r}; choose another name"))
        taken[file_id.casefold()] = shortname
        problems += [
            Problem(document.location_of((shortname, *place)), f"{shortname!r}: {what}")
            for place, what in found
        ]
        if not found:
            text = fields.get("prompt", fields.get("caption"))
            prompts.append(
                Prompt(file_id, text, fields.get("negative_prompt", negative), fields.get("seed"))
            )
    if problems:
        raise ConfigError(problems)
    return prompts


def _prompt_problems(fields: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with one entry of the library: (place inside it, sentence)."""
    if not isinstance(fields, dict):
        yield (), 'must be a prompt, or {"prompt": ..., "negative_prompt": ..., "seed": ...}'
        return
    for field in sorted(fields.keys() - set(PROMPT_FIELDS)):
        hint = did_you_mean(field, PROMPT_FIELDS) or f"; known are {', '.join(PROMPT_FIELDS)}"
        yield (field,), f"unknown field {field!r}{hint}"
    if ("prompt" in fields) == ("caption" in fields):
        yield (), "needs the field 'prompt' (or 'caption', not both)"
    for field in ("prompt", "caption", "negative_prompt"):
        if not isinstance(fields.get(field, ""), str):
            yield (field,), f"{field} must be text, not {fields[field]!r}"
    seed = fields.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        yield ("seed",), f"seed must be a whole number from 0, not {seed!r}"


def safe_file_name(shortname: str) -> str:
    """Letters, digits, "_", "." and "-" of the name; never a path, a hidden file or empty space."""
    name = unicodedata.normalize("NFC", shortname)
    cleaned = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
    return re.sub(r"-{2,}", "-", cleaned).strip(".-")[:MAX_ID_LENGTH].rstrip(".-")
