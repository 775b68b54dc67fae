from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.config.schema import DataOptions, ValidationOptions
from simpletuner.errors import ConfigError
from simpletuner.validation.prompts import (
    Prompt,
    make_image_specs,
    parse_sizes,
    prompt_texts,
    read_prompts,
    safe_file_name,
)


def read(tmp_path: Path, text: str, **options: object) -> tuple[Prompt, ...]:
    (tmp_path / "library.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    return read_prompts(ValidationOptions(user_prompt_library="library.json", **options), tmp_path)


def test_the_library_follows_the_prompt_and_its_fields_win(tmp_path: Path) -> None:
    library = """{
      // comments and a trailing comma
      "a cat/../x": "a cat",
      "dog": {"caption": "a dog", "negative_prompt": "cats", "seed": 7},
      "unconditional": "",
    }"""
    found = read(tmp_path, library, validation_prompt="first", validation_negative_prompt="blur")
    assert found == (
        Prompt("validation", "first", "blur"),
        Prompt("a-cat-..-x", "a cat", "blur"),
        Prompt("dog", "a dog", "cats", 7),
        Prompt("unconditional", "", "blur"),
    )
    assert prompt_texts(found, 1.0) == ("first", "a cat", "a dog", "")
    assert prompt_texts(found, 2.0) == ("first", "a cat", "a dog", "", "blur", "cats")


def test_no_prompt_is_no_picture(tmp_path: Path) -> None:
    assert read_prompts(ValidationOptions(), tmp_path) == ()


BAD = {
    "not a file name": ('{"../..": "x"}', ":1:2: '../..': the name has no letter"),
    "taken": (
        '{"Validation": "x"}',
        ":1:2: 'Validation': the file name would be the same as for 'validation_prompt'",
    ),
    "same file": (
        '{"a b": "x",\n "a/b": "y"}',
        ":2:2: 'a/b': the file name would be the same as for 'a b'",
    ),
    "null": ('{"a": null}', ":1:2: 'a': must be a prompt, or"),
    "list": ('{"a": ["b"]}', ":1:2: 'a': must be a prompt, or"),
    "typo": ('{"a": {"promt": "b"}}', ":1:8: 'a': unknown field 'promt'; did you mean 'prompt'?"),
    "foreign": (
        '{"a": {"prompt": "b", "bbox_entities": []}}',
        "unknown field 'bbox_entities'; allowed are",
    ),
    "both": ('{"a": {"prompt": "b", "caption": "c"}}', "needs the field 'prompt'"),
    "number": ('{"a": {"prompt": 3}}', "prompt must be text, not 3"),
    "seed": (
        '{"a": {"prompt": "b", "seed": -1}}',
        "seed must be a whole number, 0 or larger, not -1",
    ),
    "true seed": ('{"a": {"prompt": "b", "seed": true}}', "not True"),
    "list of prompts": ('["a"]', ":1:1: must be an object"),
    "broken": ('{"a": "b"', ":1:10: "),
    "latin-1": ('{"a": "\udce9"}', "is not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_library(tmp_path: Path, name: str) -> None:
    text, expected = BAD[name]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert "library.json" in str(caught.value)
    assert expected in str(caught.value)


def test_every_problem_of_the_library_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, '{"a": 1, "b": "fine", "c": {"seed": 2.5}}')
    assert len(caught.value.problems) == 3


def test_missing_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'nowhere\.json' is not a file"):
        read_prompts(ValidationOptions(user_prompt_library="nowhere.json"), tmp_path)


@pytest.mark.parametrize(
    "name", ["a" * 500, "猫と犬" * 100, "con\x00trol\n", ".hidden", "..", "/etc/passwd", "C:\\x"]
)
def test_ids_stay_in_their_folder(name: str) -> None:
    cleaned = safe_file_name(name)
    assert len(f"{cleaned}-10-4096x4096-ema.png".encode()) < 255
    assert not set(cleaned) & set("/\\\0\n:")
    assert not cleaned.startswith(".")


def test_sizes() -> None:
    data = DataOptions(resolution=512)
    assert parse_sizes("512, 512x768,512", data, 64) == (((512, 512), (512, 768)), ())
    sizes, notes = parse_sizes("500x100", data, 64)
    assert sizes == ((512, 128),)
    assert "500x100" in notes[0]
    assert "512x128" in notes[0]
    assert parse_sizes(None, data, 64)[0] == ((512, 512),)
    assert parse_sizes(None, DataOptions(resolution=1.0, resolution_type="area"), 64)[0] == (
        (1024, 1024),
    )
    for bad in (
        "",
        ",",
        "0",
        "32",
        "9999",
        "512x",
        "-512",
        "0.5",
        "512 512",
        "x",
        "512x512x512",
        "²",
    ):
        with pytest.raises(ConfigError, match=r"validation_resolution: .* is not a size"):
            parse_sizes(bad or " ", data, 64)


def test_pictures_count_seeds_up() -> None:
    listed = make_image_specs(
        [Prompt("a", "a"), Prompt("b", "b", seed=7)], [(64, 64), (64, 128)], 2, 42
    )
    assert [(one.stem, one.seed) for one in listed] == [
        ("a-0-64x64", 42), ("a-1-64x64", 43), ("b-0-64x64", 7), ("b-1-64x64", 8),
        ("a-0-64x128", 42), ("a-1-64x128", 43), ("b-0-64x128", 7), ("b-1-64x128", 8),
    ]  # fmt: skip


def test_built_in_prompts_come_last_and_the_users_own_win(tmp_path: Path) -> None:
    (tmp_path / "library.json").write_text('{"subject-dog": "my dog"}')
    options = ValidationOptions(
        validation_prompt="mine",
        user_prompt_library="library.json",
        validation_prompt_library=True,
        validation_negative_prompt="blurry",
    )
    prompts = read_prompts(options, tmp_path, "zwx")
    assert [prompt.text for prompt in prompts[:3]] == ["mine", "my dog", "zwx"]
    assert len(prompts) == 2 + 50 - 1
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert {prompt.negative for prompt in prompts} == {"blurry"}
    assert all(prompt.id == safe_file_name(prompt.id) for prompt in prompts)


def test_a_prompt_has_its_own_size_and_strength(tmp_path: Path) -> None:
    library = '{"wide": {"prompt": "a", "size": "130x65", "adapter_strength": 0.5}, "plain": "b"}'
    prompts = read(tmp_path, library)
    assert prompts == (Prompt("wide", "a", "", None, "130x65", 0.5), Prompt("plain", "b"))
    listed = make_image_specs(prompts, [(64, 64)], 2, 42, alignment_px=16)
    assert [one.stem for one in listed] == [
        "plain-0-64x64", "plain-1-64x64", "wide-0-128x64", "wide-1-128x64",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ('"size": "32"', 'size must be pixels from 64 to 4096, such as "512" or "512x768"'),
        ('"size": 512', "size must be pixels"),
        ('"adapter_strength": true', "adapter_strength must be a number from -10 to 10"),
        ('"adapter_strength": 11', "adapter_strength must be a number"),
    ],
)
def test_sizes_and_strengths_that_cannot_be(tmp_path: Path, field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, f'{{"a": {{"prompt": "b", {field}}}}}')
