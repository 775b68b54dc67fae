"""The drawing program: the same picture every time, and captions that tell the truth."""

from __future__ import annotations

import hashlib
from pathlib import Path

import make_shapes_dataset as draw
import numpy as np
import pytest
from PIL import Image

import simpletuner
from simpletuner.validation.shapes import scene_scoring, scenes
from simpletuner.validation.shapes.scenes import ZORBO
from simpletuner.validation.shapes.zorbo import compose_zorbo_scene

SCENES = [scenes.compose_scene(1, number) for number in range(300)]
EXAMPLE = Path(simpletuner.__file__).parent / "examples" / "chroma-nano.peft-lora" / "zorbo"


def test_a_scene_depends_on_its_number_alone() -> None:
    assert scenes.compose_scene(1, 7) == SCENES[7]
    assert scenes.compose_scene(2, 7) != SCENES[7]
    assert len({scene.caption for scene in SCENES}) > 290
    assert np.array_equal(
        np.asarray(draw.render_scene(SCENES[7])),
        np.asarray(draw.render_scene(scenes.compose_scene(1, 7))),
    )


def test_the_world_is_the_one_that_the_base_was_trained_on() -> None:
    """Whoever moves a draw makes other pictures of every seed, and the base's training
    unrepeatable.
    """
    text = "\n".join(scene.caption for scene in SCENES)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "d65220880507bdf0"
    assert SCENES[7].objects[0].angle == 0.010310390576907136


def test_every_word_of_the_language_occurs() -> None:
    said = " ".join(scene.caption for scene in SCENES)
    for word in (
        *scenes.SHAPES,
        *scenes.COLOURS,
        *scenes.BACKGROUNDS,
        *scenes.POSITIONS,
        "small",
        "big",
        "striped",
        "dotted",
    ):
        assert word in said


@pytest.mark.parametrize("number", range(60))
def test_the_caption_says_what_is_drawn(number: int) -> None:
    scene = SCENES[number]
    pixels = np.asarray(draw.render_scene(scene)).astype(int)
    corner = pixels[[1, 1, -2, -2], [1, -2, 1, -2]]
    assert np.abs(corner - scenes.BACKGROUNDS[scene.background]).max() <= 3
    assert scene.background in scene.caption
    strange = np.abs(pixels - pixels[1, 1]).sum(axis=2) > 60
    rows, columns = np.nonzero(strange)
    assert len(rows) > 100
    for thing in scene.objects:
        assert f"{thing.colour} {thing.shape}" in scene.caption
        assert any(place in scene.caption for place in scenes.POSITION_PHRASES[thing.position])
    if len(scene.objects) == 1:
        (thing,) = scene.objects
        middle = (
            np.array([columns.min() + columns.max(), rows.min() + rows.max()]) / 2 / scenes.SIDE_PX
        )
        assert (
            np.abs(middle - thing.centre).max() < 0.11
        )  # a crescent's own middle lies a little aside
        assert ("small" in scene.caption or "little" in scene.caption) == (thing.size == "small")
        if thing.pattern == "plain":
            assert np.abs(pixels[strange] - thing.rgb).sum(axis=1).min() < 6


def test_sizes_differ() -> None:
    areas: dict[str, list[float]] = {"big": [], "small": []}
    for scene in SCENES:
        for thing in scene.objects:
            if thing.shape == "circle" and thing.size:
                pixels = np.asarray(draw.render_scene(scene)).astype(int)
                areas[thing.size].append(
                    float((np.abs(pixels - pixels[1, 1]).sum(axis=2) > 60).mean())
                )
    assert min(areas["big"]) > 2 * max(areas["small"])


def test_things_can_be_seen() -> None:
    for scene in SCENES:
        for thing in scene.objects:
            under = np.array(scenes.BACKGROUNDS[scene.background])
            assert np.linalg.norm(under - scenes.COLOURS[thing.colour]) >= scenes.MIN_CONTRAST


def test_files_are_written_as_a_textfile_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv",
        ["make_shapes_dataset.py", "--out", str(tmp_path), "--count", "2", "--seed", "1"],
    )
    draw.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.png",
        "00000.txt",
        "00001.png",
        "00001.txt",
    ]
    assert (tmp_path / "00001.txt").read_text() == SCENES[1].caption + "\n"
    assert Image.open(tmp_path / "00001.png").size == (128, 128)


def test_the_example_is_what_the_lesson_draws() -> None:
    pictures = sorted(EXAMPLE.glob("*.png"))
    assert len(pictures) == 16
    for number, path in enumerate(pictures):
        scene = compose_zorbo_scene(number)
        assert path.with_suffix(".txt").read_text(encoding="utf-8") == scene.caption + "\n"
        drawn = np.asarray(draw.render_scene(scene)).astype(int)
        assert np.abs(drawn - np.asarray(Image.open(path).convert("RGB"))).max() <= 1
    assert all(ZORBO not in scene.caption for scene in SCENES)


def test_what_the_example_keeps_is_drawn_by_the_same_program_and_asked_by_no_score() -> None:
    pictures = sorted((EXAMPLE.parent / "shapes").glob("*.png"))
    assert len(pictures) == 48
    lessons = [scenes.compose_scene(71, number) for number in range(48)]
    for scene, path in zip(lessons, pictures):
        assert path.with_suffix(".txt").read_text(encoding="utf-8") == scene.caption + "\n"
    drawn = np.asarray(draw.render_scene(lessons[0])).astype(int)
    assert np.abs(drawn - np.asarray(Image.open(pictures[0]).convert("RGB"))).max() <= 1
    assert not {scene.caption for scene in lessons} & {
        scene.caption for scene in scene_scoring.unseen_scenes(200)[0]
    }
