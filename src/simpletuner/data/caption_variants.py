"""Variants of a caption: its tags in another order, and some of them left out.

The variants are made while the datasets are scanned, so that the text encoder sees each of them
once, before the training. They are a pure function of (seed, caption, number of the variant): equal
captions of several images share their embeddings, and a resumed run finds the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner.randomness import seed_at

# split_on -> what divides the tags of a caption, and what joins those of a variant.
TAG_SEPARATORS = {"comma": (",", ", "), "space": (None, " "), "period": (".", ". ")}


@dataclass(frozen=True)
class CaptionVariants:
    """Settings of the variants of each caption.

    count: variants of a caption, besides the caption itself with include_original. split_on: a key
    of TAG_SEPARATORS. position_start: how many of the first tags stay where they are and are never
    left out. reorder: whether the other tags are put in another order. tag_dropout: probability
    that a tag is left out. seed: None is the seed of the run.
    """

    count: int = 1
    split_on: str = "comma"
    position_start: int = 0
    reorder: bool = True
    tag_dropout: float = 0.0
    include_original: bool = True
    seed: int | None = None

    @property
    def captions_per_caption(self) -> int:
        return self.count + self.include_original

    def of_caption(self, caption: str, run_seed: int) -> tuple[str, ...]:
        """Return captions_per_caption texts; equal ones where a caption has few tags."""
        seed = run_seed if self.seed is None else self.seed
        variants = (self._make_variant(caption, seed, number) for number in range(self.count))
        return (caption, *variants) if self.include_original else tuple(variants)

    def _make_variant(self, caption: str, seed: int, number: int) -> str:
        separator, joint = TAG_SEPARATORS[self.split_on]
        parts = (part.strip() for part in caption.split(separator))
        tags = [part for part in parts if part]
        first, rest = tags[: self.position_start], tags[self.position_start :]
        address = caption, number
        indices = list(range(len(rest)))
        if self.reorder:
            indices.sort(key=lambda index: seed_at(seed, "caption shuffle", *address, index))
        remaining = [
            rest[index]
            for index in indices
            if seed_at(seed, "tag dropout", *address, index) / 2**63 >= self.tag_dropout
        ]
        if not first and not remaining:
            remaining = [rest[index] for index in indices[:1]]  # an empty caption is another option
        end = "." if self.split_on == "period" and caption.rstrip().endswith(".") else ""
        return joint.join((*first, *remaining)) + end
