"""What is asked for, and how much of it a picture has.

Colour, position and shape are counted per object, size per object whose size is said, the rest per prompt.
pair: colour, position and shape of both objects right. all: everything said is right and nothing else is
there. all_new: the same, over combinations that no training picture has. Of a zorbo, `zorbo` is there, `all`
is there and as said; the others are over the pictures that have one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from simpletuner.validation.shapes.read import Reading, Seen
from simpletuner.validation.shapes.world import POSITIONS, Scene, Thing, compose
from simpletuner.validation.shapes.zorbo import compose_lesson

SEED = 61  # no picture of it is trained on
TRAINED_SEED, TRAINED_COUNT = 1, 20_000
NOISE_SEED = 61_000  # of the first prompt; counts up
TAUGHT = 16  # the lesson's pictures before this one are the example's

# what was asked -> right or wrong, once per prompt or once per object in the order of the prompt
Verdict = dict[str, list[bool]]


class Rate(NamedTuple):
    """A share of what was counted, its standard error, and over how many."""

    rate: float
    se: float
    of: int


def unseen(count: int) -> tuple[list[Scene], list[bool]]:
    """Scenes whose captions no training picture has, and whether their meaning is new too."""
    trained = [compose(TRAINED_SEED, number) for number in range(TRAINED_COUNT)]
    captions, meanings = {scene.caption for scene in trained}, {meaning(scene) for scene in trained}
    scenes = (compose(SEED, number) for number in itertools.count())
    chosen = list(itertools.islice((scene for scene in scenes if scene.caption not in captions), count))
    return chosen, [meaning(scene) not in meanings for scene in chosen]


def unseen_zorbos(count: int) -> list[Scene]:
    return [compose_lesson(TAUGHT + number) for number in range(count)]


def meaning(scene: Scene) -> tuple[object, ...]:
    """A scene without its wording and its jitter."""
    things = [(one.shape, one.colour, one.size, one.position, one.pattern) for one in scene.things]
    return (scene.background, *sorted(things))


def judge(scene: Scene, reading: Reading, new: bool = False) -> Verdict:
    """new: no training picture has this combination."""
    pairs = list(zip(scene.things, assigned(scene.things, reading.things)))
    verdict: Verdict = {
        "background": [reading.background == scene.background],
        "count": [len(reading.things) == len(scene.things)],
        "colour": [seen is not None and seen.colour == thing.colour for thing, seen in pairs],
        "position": [seen is not None and seen.position == thing.position for thing, seen in pairs],
        "size": [seen is not None and seen.size == thing.size for thing, seen in pairs if thing.size],
        "shape": [seen is not None and seen.shape == thing.shape for thing, seen in pairs],
    }
    whole = all(itertools.chain.from_iterable(verdict.values()))
    both = all(all(verdict[name]) for name in ("colour", "position", "shape"))
    return verdict | {
        "pair": [both] * (len(pairs) == 2), "all": [whole], "all_new": [whole] if new else []
    }  # fmt: skip


def assigned(things: Sequence[Thing], seen: Sequence[Seen]) -> list[Seen | None]:
    """For each thing of the prompt an object or None: of the largest ones, the nearest to its place."""
    largest: list[Seen | None] = [*seen[: len(things)], *[None] * (len(things) - len(seen))]

    def away(order: Iterable[Seen | None]) -> float:
        return sum(
            math.dist(POSITIONS[thing.position], one.centre) for thing, one in zip(things, order) if one
        )

    return list(min(itertools.permutations(largest), key=away))


def judge_zorbo(scene: Scene, found: Reading | None) -> Verdict:
    if found is None:
        return {"zorbo": [False], "background": [], "colour": [], "position": [], "all": [False]}
    thing, seen = scene.things[0], found.things[0]
    said = {
        "zorbo": [True], "background": [found.background == scene.background],
        "colour": [seen.colour == thing.colour], "position": [seen.position == thing.position],
    }  # fmt: skip
    return said | {"all": [all(itertools.chain.from_iterable(said.values()))]}


def rates(verdicts: Sequence[Verdict]) -> dict[str, Rate]:
    """By name; what was never counted is absent. Objects of one prompt are not taken for independent."""
    told = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(verdicts)):
        counts = [(sum(verdict.get(name, ())), len(verdict.get(name, ()))) for verdict in verdicts]
        of = sum(count for _, count in counts)
        if of == 0:
            continue
        rate = sum(right for right, _ in counts) / of
        error = math.sqrt(sum((right - rate * count) ** 2 for right, count in counts)) / of
        told[name] = Rate(rate, error, of)
    return told
