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

from simpletuner.validation.shapes.detection import DetectedObject, DetectedScene
from simpletuner.validation.shapes.scenes import POSITIONS, Scene, SceneObject, compose_scene
from simpletuner.validation.shapes.zorbo import compose_zorbo_scene

SCORING_SEED = 61  # no picture of it is trained on
TRAINED_SEED, TRAINED_COUNT = 1, 20_000
NOISE_SEED = 61_000  # of the first prompt; counts up
TRAINED_ZORBO_COUNT = 16  # the lesson's pictures before this one are the example's

# what was asked -> right or wrong, once per prompt or once per object in the order of the prompt
SceneScores = dict[str, list[bool]]


class Rate(NamedTuple):
    """A share of what was counted, its standard error, and over how many."""

    rate: float
    standard_error: float
    total: int


def unseen_scenes(count: int) -> tuple[list[Scene], list[bool]]:
    """Scenes whose captions no training picture has, and whether their meaning is new too."""
    trained = [compose_scene(TRAINED_SEED, number) for number in range(TRAINED_COUNT)]
    captions, meanings = (
        {scene.caption for scene in trained},
        {scene_key(scene) for scene in trained},
    )
    scenes = (compose_scene(SCORING_SEED, number) for number in itertools.count())
    chosen = list(
        itertools.islice((scene for scene in scenes if scene.caption not in captions), count)
    )
    return chosen, [scene_key(scene) not in meanings for scene in chosen]


def unseen_zorbo_scenes(count: int) -> list[Scene]:
    return [compose_zorbo_scene(TRAINED_ZORBO_COUNT + number) for number in range(count)]


def scene_key(scene: Scene) -> tuple[object, ...]:
    """A scene without its wording and its jitter."""
    things = [(one.shape, one.colour, one.size, one.position, one.pattern) for one in scene.objects]
    return (scene.background, *sorted(things))


def score_scene(scene: Scene, reading: DetectedScene, new: bool = False) -> SceneScores:
    """new: no training picture has this combination."""
    pairs = list(zip(scene.objects, match_objects(scene.objects, reading.objects)))
    verdict: SceneScores = {
        "background": [reading.background == scene.background],
        "count": [len(reading.objects) == len(scene.objects)],
        "colour": [seen is not None and seen.colour == thing.colour for thing, seen in pairs],
        "position": [seen is not None and seen.position == thing.position for thing, seen in pairs],
        "size": [
            seen is not None and seen.size == thing.size for thing, seen in pairs if thing.size
        ],
        "shape": [seen is not None and seen.shape == thing.shape for thing, seen in pairs],
    }
    whole = all(itertools.chain.from_iterable(verdict.values()))
    both = all(all(verdict[name]) for name in ("colour", "position", "shape"))
    return verdict | {
        "pair": [both] * (len(pairs) == 2),
        "all": [whole],
        "all_new": [whole] if new else [],
    }


def match_objects(
    things: Sequence[SceneObject], seen: Sequence[DetectedObject]
) -> list[DetectedObject | None]:
    """For each thing of the prompt an object or None: of the largest ones, the nearest to its place."""
    largest: list[DetectedObject | None] = [
        *seen[: len(things)],
        *[None] * (len(things) - len(seen)),
    ]

    def away(order: Iterable[DetectedObject | None]) -> float:
        return sum(
            math.dist(POSITIONS[thing.position], one.centre)
            for thing, one in zip(things, order)
            if one
        )

    return list(min(itertools.permutations(largest), key=away))


def score_zorbo_scene(scene: Scene, found: DetectedScene | None) -> SceneScores:
    if found is None:
        return {"zorbo": [False], "background": [], "colour": [], "position": [], "all": [False]}
    thing, seen = scene.objects[0], found.objects[0]
    said = {
        "zorbo": [True],
        "background": [found.background == scene.background],
        "colour": [seen.colour == thing.colour],
        "position": [seen.position == thing.position],
    }
    return said | {"all": [all(itertools.chain.from_iterable(said.values()))]}


def compute_rates(verdicts: Sequence[SceneScores]) -> dict[str, Rate]:
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
