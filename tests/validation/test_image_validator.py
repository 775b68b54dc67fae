from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFont, features
from torch import nn

from simpletuner.adapters.adapted_linear import LoraLinear
from simpletuner.errors import DiskFull
from simpletuner.events.event_types import ContactSheetSaved, Event, ImageSaved, WarningIssued
from simpletuner.events.formatting import pick_evenly
from simpletuner.validation import fonts, validation_images
from simpletuner.validation.contact_sheet import SheetRow, write_contact_sheet
from simpletuner.validation.image_validator import ImageValidator, strength_label
from simpletuner.validation.prompts import Prompt, make_image_specs
from simpletuner.validation.validation_images import (
    GenerationSettings,
    pixels_to_image,
    read_image_metadata,
    save_png,
)
from tests.validation.toy_family import INFERENCE, ToyNetwork, decode, embed_text

PROMPTS = (Prompt("cat", "a cat\nwith 帽子", "dogs"), Prompt("dog", "a dog"))


def validator(
    run_dir: Path, events: list[Event], guidance: float = 2.0, identity: str = "one"
) -> ImageValidator:
    return ImageValidator(
        INFERENCE,
        make_image_specs(PROMPTS, [(32, 16)], 1, 42),
        GenerationSettings(4, guidance, "toy", identity),
        embed_text,
        lambda: decode,
        run_dir,
        events.append,
    )


def test_the_picture_says_how_it_was_made(tmp_path: Path) -> None:
    events: list[Event] = []
    validator(tmp_path, events).generate_images(500, ToyNetwork(), "trained")
    path = tmp_path / "images/step-000500/cat-0-32x16.png"
    with Image.open(path) as image:
        assert image.size == (32, 16)
    said = read_image_metadata(path)
    assert said["prompt"] == "a cat\nwith 帽子"
    assert said["negative_prompt"] == "dogs"
    expected = {
        "seed": "42",
        "steps": "4",
        "guidance": "2",
        "size": "32x16",
        "step": "500",
        "model": "toy",
    }
    assert {key: said[key] for key in expected} == expected
    first, second, third = said["parameters"].rsplit("\n", 2)
    assert (first, second) == ("a cat\nwith 帽子", "Negative prompt: dogs")
    assert third.startswith(
        "Steps: 4, Sampler: Euler, CFG scale: 2, Seed: 42, Size: 32x16, Model: toy, Version: "
    )
    saved = [event for event in events if isinstance(event, ImageSaved)]
    assert [(one.prompt_id, one.path, one.weights, one.width_px) for one in saved] == [
        ("cat", "images/step-000500/cat-0-32x16.png", "trained", 32),
        ("dog", "images/step-000500/dog-0-32x16.png", "trained", 32),
    ]
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_is_there_is_not_drawn_again(tmp_path: Path) -> None:
    network, events = ToyNetwork(), []
    validator(tmp_path, events).generate_images(5, network)
    first = {path: path.read_bytes() for path in (tmp_path / "images/step-000005").iterdir()}
    drawn, told = (
        len(network.calls),
        len([event for event in events if isinstance(event, ImageSaved)]),
    )
    validator(tmp_path, events).generate_images(5, network)
    assert len(network.calls) == drawn
    assert len([event for event in events if isinstance(event, ImageSaved)]) == 2 * told

    broken = tmp_path / "images/step-000005/dog-0-32x16.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    validator(tmp_path, events).generate_images(5, network)
    assert len(network.calls) == drawn + 4, "only the damaged one is drawn"
    assert {path: path.read_bytes() for path in first} == first, "and gives the same file"

    validator(tmp_path, events, guidance=1.0).generate_images(5, network)
    validator(tmp_path, events, guidance=1.0, identity="two").generate_images(5, network)
    validator(tmp_path, events, guidance=1.0, identity="two").generate_images(5, network)
    assert len(network.calls) == drawn + 12, "other settings, another run: drawn again, each once"


def test_pixels() -> None:
    pixels = torch.tensor([-1.0, 0.0, 1.0, 5.0, float("nan")]).repeat(1, 3, 1, 1)
    assert [pixels_to_image(pixels).getpixel((x, 0))[0] for x in range(5)] == [
        0,
        128,
        255,
        255,
        128,
    ]


def test_weights_that_are_broken_are_named(tmp_path: Path) -> None:
    events: list[Event] = []
    validator(tmp_path, events).generate_images(5, ToyNetwork(float("nan")))
    warned = [event.message for event in events if isinstance(event, WarningIssued)]
    assert len(warned) == 2
    assert "step 5: cat-0-32x16.png has values that are not finite" in warned[0]


def test_a_full_disk_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(validation_images.os, "replace", refuse)
    with pytest.raises(DiskFull):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_sheets_grow_with_the_run(tmp_path: Path) -> None:
    events: list[Event] = []
    drawn = validator(tmp_path, events)
    drawn.generate_images(0, ToyNetwork(0.1), "base")
    assert [event.path for event in events if isinstance(event, ContactSheetSaved)] == [
        "images/sheet.png"
    ]
    for step in range(10, 120, 10):
        drawn.generate_images(step, ToyNetwork(step / 50))
    drawn.generate_images(110, ToyNetwork(9.0), "ema")
    with Image.open(tmp_path / "images/sheet.png") as sheet:
        four_rows = sheet.size
    drawn.generate_images(120, ToyNetwork(3.0))
    assert (tmp_path / "images/step-000110/cat-0-32x16-ema.png").is_file()
    with Image.open(tmp_path / "images/before_after.png") as image:
        # Two pictures side by side, base above and the newest below, scaled to 256 px wide and 128
        # high.
        assert image.size == (176 + 2 * 264 + 8, 30 + 2 * 128 + 3 * 8)
        before, after = (image.getpixel((186, top)) for top in (34, 34 + 136))
    cat = tmp_path / "images"
    for colour, folder in ((before, "step-000000"), (after, "step-000120")):
        with Image.open(cat / folder / "cat-0-32x16.png") as image:
            difference = [abs(a - b) for a, b in zip(colour, image.getpixel((0, 0)), strict=True)]
        assert max(difference) < 12
    assert before != after
    assert four_rows == (176 + 8 * 264 + 8, 30 + 4 * 128 + 5 * 8)


def test_half_the_strength_is_a_third_row(tmp_path: Path) -> None:
    network = ToyNetwork(3.0)
    for _ in "twice":
        drawn = validator(tmp_path, [])
        drawn.extra_strengths = (0.5,)
        drawn.generate_images(0, ToyNetwork(0.1), "base")
        drawn.generate_images(10, network)
        drawn.generate_images(10, network, strength_label(0.5))
        with Image.open(tmp_path / "images/before_after.png") as image:
            assert image.height == 30 + 3 * 128 + 4 * 8
    assert sum(network.calls) == 2 * 2 * 4 * 2, (
        "two pictures at two strengths, guided, four steps: once"
    )
    assert (tmp_path / "images/step-000010/cat-0-32x16-strength-0.5.png").is_file()
    drawn.generate_images(20, network)
    with Image.open(tmp_path / "images/before_after.png") as image:
        assert image.height == 30 + 2 * 128 + 3 * 8, "of the newest step alone"


def test_pictures_of_another_run_are_not_on_the_sheet(tmp_path: Path) -> None:
    events: list[Event] = []
    validator(tmp_path, events, identity="old").generate_images(3, ToyNetwork())
    validator(tmp_path, events, identity="new").generate_images(5, ToyNetwork())
    with Image.open(tmp_path / "images/sheet.png") as sheet:
        assert sheet.width == 176 + 264 + 8


def test_columns_keep_first_and_last() -> None:
    assert pick_evenly([1, 2, 3], 8) == [1, 2, 3]
    assert pick_evenly(list(range(100)), 5) == [0, 25, 50, 74, 99]
    for count in range(8, 40):
        columns = pick_evenly(list(range(count)), 8)
        assert len(set(columns)) == 8
        assert (columns[0], columns[-1]) == (0, count - 1)


def test_a_hole_in_the_sheet_stays_grey(tmp_path: Path) -> None:
    write_contact_sheet(
        [SheetRow("nothing " * 30, "x" * 4000, {})], {"a": "a" * 300}, tmp_path / "sheet.png"
    )
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.getpixel((300, 150)) == (0xEC, 0xEC, 0xEC)


def test_labels_are_written_in_the_letters_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fonts.renderable_text("a cat", 14)[0] == "a cat"
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ("no such font.ttf",))
    assert fonts.renderable_text("un año \U0010fffd", 17)[0] == "un ano ?"


@pytest.mark.skipif(not features.check("freetype2"), reason="no fonts at all")
def test_a_font_of_the_computer_is_used_where_it_has_the_letters() -> None:
    try:
        ImageFont.truetype("DejaVuSans.ttf", 14)
    except OSError:
        pytest.skip("the font of this test is not here")
    text, font = fonts.renderable_text("un año, привет", 14)
    assert text == "un año, привет"
    boxes = font.getmask("\U0010fffe")
    assert all(bytes(font.getmask(letter)) != bytes(boxes) for letter in "ñпр")


def test_the_vae_is_held_only_while_pictures_are_drawn(tmp_path: Path) -> None:
    class Held:
        def __call__(self, latents: torch.Tensor) -> torch.Tensor:
            return decode(latents)

    seen: list[weakref.ref[Held]] = []

    def decoder() -> Held:
        seen.append(weakref.ref(held := Held()))
        return held

    one = validator(tmp_path, [])
    one.load_decoder = decoder
    one.generate_images(5, ToyNetwork())
    gc.collect()
    assert [ref() for ref in seen] == [None]
    one.generate_images(5, ToyNetwork())
    assert len(seen) == 1, "nothing to draw, nothing to load"


def test_each_prompt_has_its_strength_of_the_adapter(tmp_path: Path) -> None:
    """The strength of a prompt multiplies that of the adapter, which is as before afterwards."""
    network = ToyNetwork()
    network.adapted = LoraLinear(nn.Linear(4, 4), torch.ones(2, 4), torch.ones(4, 2))  # type: ignore[assignment]
    network.adapted.strength = 0.5
    seen: list[float] = []
    network.register_forward_hook(
        lambda module, inputs, output: seen.append(module.adapted.strength)
    )
    events: list[Event] = []
    images = validator(tmp_path, events, guidance=1.0)
    prompts = (Prompt("half", "a cat", strength=0.5), Prompt("whole", "a dog"))
    images.image_specs = make_image_specs(prompts, [(32, 16)], 1, 42)
    images.generate_images(500, network, "trained")
    assert seen == [0.25] * 4 + [0.5] * 4
    assert network.adapted.strength == 0.5
    half = read_image_metadata(tmp_path / "images/step-000500/half-0-32x16.png")
    whole = read_image_metadata(tmp_path / "images/step-000500/whole-0-32x16.png")
    assert (half["strength"], "strength" in whole) == ("0.5", False)
    # An image of another strength is not taken for this one.
    images.image_specs = make_image_specs((Prompt("half", "a cat"),), [(32, 16)], 1, 42)
    seen.clear()
    images.generate_images(500, network, "trained")
    assert seen == [0.5] * 4
