"""The score's own test: right on the truth, at chance on others' prompts, and no blind spot in
between.
"""

from __future__ import annotations

from dataclasses import replace

import make_shapes_dataset as draw
import numpy as np
import pytest
import score
import torch
from PIL import Image, ImageFilter

from simpletuner.config.image_metrics import IMAGE_METRICS
from simpletuner.config.schema import ValidationOptions
from simpletuner.validation.image_scoring import METRICS, Metric, choose_metrics
from simpletuner.validation.shapes import scene_scoring, scenes
from simpletuner.validation.shapes.detection import DetectedObject, DetectedScene, detect_scene
from simpletuner.validation.shapes.zorbo import compose_zorbo_scene, detect_zorbo

SCENES = [scenes.compose_scene(scene_scoring.SCORING_SEED, number) for number in range(200)]
READINGS = [detect_scene(draw.render_scene(scene)) for scene in SCENES]
ZORBOS = [compose_zorbo_scene(scene_scoring.TRAINED_ZORBO_COUNT + number) for number in range(32)]
SINGLE = next(s for s in SCENES if len(s.objects) == 1 and s.objects[0].size == "big")
PAIR = next(s for s in SCENES if len(s.objects) == 2 and s.objects[0].colour != s.objects[1].colour)


def metric(name: str, prompts: int | None) -> Metric:
    options = ValidationOptions(evaluation_type=name, evaluation_prompts=prompts)
    return choose_metrics(options, torch.device("cpu"))[0]


def failed(scene: scenes.Scene, picture: Image.Image) -> set[str]:
    verdict = scene_scoring.score_scene(scene, detect_scene(picture))
    return {name for name, right in verdict.items() if not all(right)} - {"all", "pair"}


def test_the_truth_is_right() -> None:
    told = scene_scoring.compute_rates(
        [scene_scoring.score_scene(scene, reading) for scene, reading in zip(SCENES, READINGS)]
    )
    assert {"background", "count", "colour", "position", "size", "shape", "pair", "all"} == set(
        told
    )
    assert min(figures.rate for figures in told.values()) >= 0.99


@pytest.mark.parametrize("pattern", ["striped", "dotted"])
@pytest.mark.parametrize("colour", list(scenes.COLOURS))
def test_textures_hide_neither_shape_nor_colour(pattern: str, colour: str) -> None:
    ground = "olive" if colour in ("white", "yellow", "pink") else "cream"
    for shape in (list(scenes.COLOURS).index(colour), 4 + list(scenes.COLOURS).index(colour)):
        thing = replace(
            SINGLE.objects[0], pattern=pattern, colour=colour, rgb=scenes.COLOURS[colour]
        )
        things = (replace(thing, shape=list(scenes.SHAPES)[shape % len(scenes.SHAPES)]),)
        scene = replace(
            SINGLE, objects=things, background=ground, background_rgb=scenes.BACKGROUNDS[ground]
        )
        assert failed(scene, draw.render_scene(scene)) == set(), things


def test_a_blurred_and_tinted_picture_is_still_read() -> None:
    right = [
        not failed(
            scene, tinted(draw.render_scene(scene).filter(ImageFilter.GaussianBlur(1.2)), number)
        )
        for number, scene in enumerate(SCENES[:24])
    ]
    assert np.mean(right) >= 0.95


def tinted(picture: Image.Image, number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    pixels = np.asarray(picture) + rng.normal(0, 5, (128, 128, 3)) + rng.uniform(-9, 9, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def test_a_wavering_hand_is_still_read() -> None:
    right = [
        not failed(scene, wavering(draw.render_scene(scene), number))
        for number, scene in enumerate(SCENES[:24])
    ]
    assert np.mean(right) >= 0.95


def wavering(picture: Image.Image, number: int) -> Image.Image:
    """Every pixel is moved by about 2 px, neighbours alike."""
    rng = np.random.default_rng(number)
    coarse = [Image.fromarray(rng.normal(0, 2, (13, 13)).astype(np.float32)) for _ in "yx"]
    moves = [np.asarray(one.resize((128, 128), Image.Resampling.BICUBIC)) for one in coarse]
    rows, columns = (
        np.clip(np.rint(at + move), 0, 127).astype(int)
        for at, move in zip(np.mgrid[:128, :128], moves)
    )
    return Image.fromarray(np.asarray(picture)[rows, columns])


def test_another_prompt_is_right_by_chance_only() -> None:
    """Every prompt against every other picture: 9,900 pairs, against the shares of the drawing
    program.
    """
    told = scene_scoring.compute_rates(
        [
            scene_scoring.score_scene(scene, reading)
            for i, scene in enumerate(SCENES[:100])
            for j, reading in enumerate(READINGS[:100])
            if i != j
        ]
    )
    for name, low, high in (
        ("background", 0.08, 0.13),
        ("colour", 0.07, 0.15),
        ("position", 0.15, 0.30),
        ("size", 0.42, 0.58),
        ("shape", 0.08, 0.14),
        ("pair", 0.0, 0.01),
        ("all", 0.0, 0.002),
    ):
        assert low <= told[name].rate <= high, name


def test_shuffling_leaves_no_prompt_with_its_picture() -> None:
    moved = score.shuffle_scenes(SCENES)
    assert sorted(scene.caption for scene in moved) == sorted(scene.caption for scene in SCENES)
    assert not any(ours is theirs for ours, theirs in zip(SCENES, moved))


def other(
    things: tuple[scenes.SceneObject, ...], **changed: object
) -> tuple[scenes.SceneObject, ...]:
    return (replace(things[0], **changed), *things[1:])  # type: ignore[arg-type]


def visible(names: dict[str, scenes.Rgb], not_this: str, beside: list[scenes.Rgb]) -> scenes.Rgb:
    """Another named colour that stands out from all beside it."""
    return next(
        rgb
        for name, rgb in names.items()
        if name != not_this
        and all(np.linalg.norm(np.subtract(rgb, b)) >= scenes.MIN_CONTRAST for b in beside)
    )


@pytest.mark.parametrize("scene", [SINGLE, PAIR], ids=["single", "pair"])
def test_only_what_is_wrong_fails(scene: scenes.Scene) -> None:
    thing = scene.objects[0]
    ground = visible(scenes.BACKGROUNDS, scene.background, [thing.rgb for thing in scene.objects])
    colour = visible(scenes.COLOURS, thing.colour, [scene.background_rgb])
    shape = "ring" if thing.shape == "circle" else "circle"
    assert failed(scene, draw.render_scene(scene)) == set()
    assert failed(scene, draw.render_scene(replace(scene, background_rgb=ground))) == {"background"}
    assert failed(
        scene, draw.render_scene(replace(scene, objects=other(scene.objects, rgb=colour)))
    ) == {"colour"}
    assert failed(
        scene, draw.render_scene(replace(scene, objects=other(scene.objects, shape=shape)))
    ) == {"shape"}


def test_size_place_and_number_are_seen() -> None:
    (thing,) = SINGLE.objects
    small = replace(
        SINGLE, objects=other(SINGLE.objects, radius=scenes.SIZES["small"], pattern="plain")
    )
    assert failed(SINGLE, draw.render_scene(small)) == {"size"}
    place = scenes.POSITIONS["top" if thing.position != "top" else "left"]
    assert failed(
        SINGLE, draw.render_scene(replace(SINGLE, objects=other(SINGLE.objects, centre=place)))
    ) == {"position"}
    assert failed(PAIR, draw.render_scene(replace(PAIR, objects=PAIR.objects[:1]))) >= {
        "count",
        "colour",
        "shape",
    }
    twice = replace(SINGLE, objects=(replace(thing, radius=0.15, centre=(0.2, 0.2)),
                                    replace(thing, radius=0.15, centre=(0.8, 0.8))))  # fmt: skip
    assert {"count", "position"} <= failed(SINGLE, draw.render_scene(twice))


def test_swapped_colours_of_a_pair_are_wrong() -> None:
    first, second = PAIR.objects
    swapped = replace(
        PAIR, objects=(replace(first, rgb=second.rgb), replace(second, rgb=first.rgb))
    )
    verdict = scene_scoring.score_scene(PAIR, detect_scene(draw.render_scene(swapped)))
    assert verdict["colour"] == [False, False]
    assert verdict["pair"] == [False]
    assert verdict["shape"] == verdict["position"] == [True, True]


def test_an_empty_picture_and_noise_are_no_answer() -> None:
    nothing = detect_scene(Image.new("RGB", (128, 128), SINGLE.background_rgb))
    assert nothing == DetectedScene(SINGLE.background, ())
    assert failed(SINGLE, Image.new("RGB", (128, 128), SINGLE.background_rgb)) == {
        "count", "colour", "position", "size", "shape",
    }  # fmt: skip
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    reading = detect_scene(Image.fromarray(noise))
    assert not any(scene_scoring.score_scene(scene, reading)["all"][0] for scene in SCENES)
    with pytest.raises(ValueError, match="128"):
        detect_scene(Image.new("RGB", (64, 64)))


def test_a_blob_has_no_shape() -> None:
    pixels = np.full((128, 128, 3), 200, np.uint8)
    for x, y, w, h in (
        (30, 30, 12, 70),
        (30, 30, 60, 12),
        (78, 30, 12, 40),
        (55, 88, 40, 12),
        (36, 88, 30, 12),
    ):
        pixels[y : y + h, x : x + w] = (215, 35, 40)
    (thing,) = detect_scene(Image.fromarray(pixels)).objects
    assert (thing.shape, thing.colour) == ("none", "red")


def test_standard_errors() -> None:
    told = scene_scoring.compute_rates([{"a": [True]}] * 3 + [{"a": [False]}, {"b": []}])
    assert list(told) == ["a"]
    assert told["a"][:3] == (0.75, pytest.approx((0.75 * 0.25 / 4) ** 0.5), 4)
    pairs = scene_scoring.compute_rates([{"a": [True, True]}, {"a": [False, False]}])
    assert pairs["a"][:3] == (0.5, pytest.approx((0.25 / 2) ** 0.5), 4)  # as two, not as four


def test_the_table_of_unseen_prompts_is_that_of_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    count = scene_scoring.TABLE_LENGTH - len(scene_scoring.REPEATED_CAPTIONS)
    assert scene_scoring.unseen_scenes(count) == scene_scoring.search_unseen_scenes(count)
    monkeypatch.setattr(scene_scoring, "search_unseen_scenes", lambda count: count)
    assert scene_scoring.unseen_scenes(count + 1) == count + 1, "the table does not reach so far"


def test_prompts_are_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene_scoring, "TRAINED_SEED", scene_scoring.SCORING_SEED)
    monkeypatch.setattr(scene_scoring, "TRAINED_COUNT", 5)
    chosen, new = scene_scoring.search_unseen_scenes(10)
    trained = [scenes.compose_scene(scene_scoring.SCORING_SEED, number) for number in range(5)]
    assert not {scene.caption for scene in chosen} & {scene.caption for scene in trained}
    assert chosen[0] == scenes.compose_scene(scene_scoring.SCORING_SEED, 5)
    monkeypatch.setattr(scene_scoring, "TRAINED_COUNT", 0)
    assert scene_scoring.search_unseen_scenes(3) == (
        [scenes.compose_scene(scene_scoring.SCORING_SEED, number) for number in range(3)],
        [True] * 3,
    )
    assert all(new)


def test_zorbos_are_found_with_colour_place_and_ground() -> None:
    told = scene_scoring.compute_rates(
        [
            scene_scoring.score_zorbo_scene(scene, detect_zorbo(draw.render_scene(scene)))
            for scene in ZORBOS
        ]
    )
    assert min(figures.rate for figures in told.values()) >= 0.99
    taught = {
        compose_zorbo_scene(number).caption for number in range(scene_scoring.TRAINED_ZORBO_COUNT)
    }
    assert not taught & {scene.caption for scene in ZORBOS}


def test_there_is_no_zorbo_in_a_picture_without_one() -> None:
    assert sum(detect_zorbo(draw.render_scene(scene)) is not None for scene in SCENES[:100]) == 0
    assert scene_scoring.score_zorbo_scene(ZORBOS[0], None)["all"] == [False]


def test_an_hourglass_among_the_shapes_is_read_as_none_of_them() -> None:
    told = [
        scene_scoring.score_scene(scene, detect_scene(draw.render_scene(scene)))
        for scene in ZORBOS[:8]
    ]
    assert not any(verdict["shape"][0] for verdict in told)


def test_an_object_is_assigned_to_the_nearest_place() -> None:
    left, right = (
        DetectedObject("star", "red", "small", place, centre)
        for place, centre in (("left", (0.26, 0.5)), ("right", (0.74, 0.5)))
    )
    things = tuple(replace(PAIR.objects[0], position=place) for place in ("left", "right"))
    assert scene_scoring.match_objects(things, (right, left)) == [left, right]
    assert scene_scoring.match_objects(things, (right,)) == [None, right]
    assert scene_scoring.match_objects(things[:1], ()) == [None]


def test_the_sheet_has_a_place_for_each() -> None:
    judged = [
        scene_scoring.score_scene(scene, reading) for scene, reading in zip(SCENES[:7], READINGS)
    ]
    page = score.make_score_sheet(
        SCENES[:7], [draw.render_scene(scene) for scene in SCENES[:7]], judged
    )
    green, red = (
        np.all(np.asarray(page) == colour, axis=2).sum() for colour in (score.GREEN, score.RED)
    )
    assert green > 50
    assert red == 0
    judged[0]["shape"] = [False]
    page = score.make_score_sheet(
        SCENES[:7], [draw.render_scene(scene) for scene in SCENES[:7]], judged
    )
    assert np.all(np.asarray(page) == score.RED, axis=2).any()


def test_a_metric_reads_what_it_asked_for() -> None:
    shapes = metric("shapes", 24)
    truth = [draw.render_scene(scene) for scene in SCENES]
    drawn = {scene.caption: picture for scene, picture in zip(SCENES, truth)}
    wanted = [drawn[picture.prompt.text] for picture in shapes.image_specs]
    assert {one.rate for one in shapes.score(wanted).values()} == {1.0}
    assert shapes.score(wanted[1:] + wanted[:1])["all"].rate == 0
    zorbos = metric("zorbo", None)
    assert len(zorbos.image_specs) == 32
    found = zorbos.score([draw.render_scene(scene) for scene in ZORBOS])
    assert found["all"].rate >= 0.99
    none = zorbos.score(truth[:32])
    assert {name: tuple(rate)[:3] for name, rate in none.items()} == {
        "zorbo": (0, 0, 32),
        "all": (0, 0, 32),
    }
    assert none["all"].by_prompt == (0,) * 32


def test_prompts_of_a_metric_are_always_the_same() -> None:
    few, many = metric("zorbo", 4).image_specs, metric("zorbo", 9).image_specs
    assert many[:4] == few
    assert {picture.size_px for picture in many} == {(128, 128)}
    assert len({picture.seed for picture in many}) == 9
    assert METRICS.keys() == IMAGE_METRICS.keys()
