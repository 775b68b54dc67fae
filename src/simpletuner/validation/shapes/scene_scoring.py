"""Compare the scene that a prompt describes with the scene that was detected in the image.

Colour, position and shape are counted per object, size per object whose caption gives a size, and
the rest per prompt. pair: colour, position and shape of both objects are right. all: everything in
the caption is right, and the image has nothing else. all_new: the same, over combinations that no
training image has. For zorbos: `zorbo` means that the image has one, `all` that it is also as
described; the other rates are over the images that have one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from simpletuner.validation.shapes.detection import DetectedObject, DetectedScene
from simpletuner.validation.shapes.scenes import POSITIONS, Scene, SceneObject, compose_scene
from simpletuner.validation.shapes.zorbo import compose_zorbo_scene

SCORING_SEED = 61  # no training image uses it
TRAINED_SEED, TRAINED_COUNT = 1, 20_000
# Among the first scenes to score, the numbers of those whose caption a training image has, and one
# bit for each whose content a training image has, the first in the lowest bit. A search finds the
# same, by composing all training images, which would take two seconds at every start.
TABLE_LENGTH = 512
REPEATED_CAPTIONS = (92, 125, 140, 142, 196, 244, 305, 365, 499, 508)
REPEATED_CONTENTS = int(
    "5aac796a62bd6dcbed3a19fd9815dcf4c882f694af99542ffc0e9149fbdb6b73"
    "7a7188cee661ab96f27cb9e9f51bd7fbe019547d72ed60d57a6f72e30d6ef998",
    16,
)
NOISE_SEED = 61_000  # of the first prompt; the others count up from it
TRAINED_ZORBO_COUNT = 16  # the first zorbo scenes are the training images of the example

# Attribute -> right or wrong, once per prompt, or once per object in the order of the prompt.
SceneScores = dict[str, list[bool]]


class Rate(NamedTuple):
    """The value of a metric (here a fraction), its standard error, and how many were counted.

    by_prompt: the value of each prompt, in order; empty where a prompt counts more than once.
    """

    rate: float
    standard_error: float
    total: int
    by_prompt: tuple[float, ...] = ()


def unseen_scenes(count: int) -> tuple[list[Scene], list[bool]]:
    """Return scenes whose captions no training image has, and whether their content is new too."""
    numbers = [number for number in range(TABLE_LENGTH) if number not in REPEATED_CAPTIONS]
    if count > len(numbers):
        return search_unseen_scenes(count)
    return (
        [compose_scene(SCORING_SEED, number) for number in numbers[:count]],
        [not REPEATED_CONTENTS >> number & 1 for number in numbers[:count]],
    )


def search_unseen_scenes(count: int) -> tuple[list[Scene], list[bool]]:
    """Do as `unseen_scenes`, by comparing with all training images."""
    trained = [compose_scene(TRAINED_SEED, number) for number in range(TRAINED_COUNT)]
    captions = {scene.caption for scene in trained}
    contents = {scene_key(scene) for scene in trained}
    scenes = (compose_scene(SCORING_SEED, number) for number in itertools.count())
    chosen = list(
        itertools.islice((scene for scene in scenes if scene.caption not in captions), count)
    )
    return chosen, [scene_key(scene) not in contents for scene in chosen]


def held_out_zorbo_scenes(count: int) -> list[Scene]:
    """Return zorbo scenes that are not among the training images of the example."""
    return [compose_zorbo_scene(TRAINED_ZORBO_COUNT + number) for number in range(count)]


def scene_key(scene: Scene) -> tuple[object, ...]:
    """Return the content of a scene, without its wording and its jitter."""
    objects = [
        (item.shape, item.colour, item.size, item.position, item.pattern) for item in scene.objects
    ]
    return (scene.background, *sorted(objects))


def score_scene(scene: Scene, detected: DetectedScene, is_new: bool = False) -> SceneScores:
    """Score one image. is_new: whether no training image has this combination."""
    pairs = list(zip(scene.objects, match_objects(scene.objects, detected.objects)))

    def matches(attribute: Callable[[SceneObject | DetectedObject], str]) -> list[bool]:
        return [
            seen is not None and attribute(seen) == attribute(wanted)
            for wanted, seen in pairs
            if attribute(wanted)
        ]

    scores: SceneScores = {
        "background": [detected.background == scene.background],
        "count": [len(detected.objects) == len(scene.objects)],
        "colour": matches(lambda item: item.colour),
        "position": matches(lambda item: item.position),
        "size": matches(lambda item: item.size),  # the caption of a pair gives no sizes
        "shape": matches(lambda item: item.shape),
    }
    all_right = all(itertools.chain.from_iterable(scores.values()))
    pair_right = all(all(scores[name]) for name in ("colour", "position", "shape"))
    return scores | {
        "pair": [pair_right] * (len(pairs) == 2),
        "all": [all_right],
        "all_new": [all_right] if is_new else [],
    }


def match_objects(
    wanted: Sequence[SceneObject], detected: Sequence[DetectedObject]
) -> list[DetectedObject | None]:
    """Return for each object of the prompt a detected one, or None.

    Only the largest detected objects are used, in the order with the smallest sum of distances from
    the positions that the prompt asks for.
    """
    largest: list[DetectedObject | None] = [
        *detected[: len(wanted)],
        *[None] * (len(wanted) - len(detected)),
    ]

    def total_distance(order: Iterable[DetectedObject | None]) -> float:
        return sum(
            math.dist(POSITIONS[item.position], seen.centre)
            for item, seen in zip(wanted, order)
            if seen
        )

    return list(min(itertools.permutations(largest), key=total_distance))


def score_zorbo_scene(scene: Scene, detected: DetectedScene | None) -> SceneScores:
    """Score one image. detected: None where the image has no zorbo."""
    if detected is None:
        return {"zorbo": [False], "background": [], "colour": [], "position": [], "all": [False]}
    wanted, seen = scene.objects[0], detected.objects[0]
    scores = {
        "zorbo": [True],
        "background": [detected.background == scene.background],
        "colour": [seen.colour == wanted.colour],
        "position": [seen.position == wanted.position],
    }
    return scores | {"all": [all(itertools.chain.from_iterable(scores.values()))]}


def compute_rates(scores: Sequence[SceneScores]) -> dict[str, Rate]:
    """Return the rates by name; a name that was never counted is absent.

    The standard error does not treat the objects of one prompt as independent.
    """
    rates = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(scores)):
        counts = [(sum(image.get(name, ())), len(image.get(name, ()))) for image in scores]
        total = sum(count for _, count in counts)
        if total == 0:
            continue
        rate = sum(right for right, _ in counts) / total
        error = math.sqrt(sum((right - rate * count) ** 2 for right, count in counts)) / total
        is_once_per_prompt = all(count == 1 for _, count in counts)
        by_prompt = tuple(float(right) for right, _ in counts) if is_once_per_prompt else ()
        rates[name] = Rate(rate, error, total, by_prompt)
    return rates
