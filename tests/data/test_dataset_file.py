from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data.caption_variants import CaptionVariants
from simpletuner.data.dataset_config import ActivePeriod, DatasetFile
from simpletuner.data.dataset_fields import (
    COMMON_FIELDS,
    HARMLESS_VALUES,
    IMAGE_FIELDS,
    REFUSED_FIELDS,
)
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.data.source_fields import SOURCE_FIELDS
from simpletuner.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path


def read(folder: Path, *sets: object, **options: object) -> DatasetFile:
    path = folder / "multidatabackend.json"
    path.write_text(json.dumps(list(sets), indent=1))
    return read_dataset_file(path, DataOptions(**options), {"PICTURES": "photos"})


def problems(folder: Path, *sets: object, **options: object) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read(folder, *sets, **options)
    return [str(problem) for problem in error.value.problems]


def photos(**fields: object) -> dict[str, object]:
    return {"id": "photos", "instance_data_dir": "photos"} | fields


def test_smallest_file_takes_the_options(folder: Path) -> None:
    (dataset,) = read(folder, photos(), resolution=512, minimum_aspect_ratio=0.5).train
    assert dataset.instance_data_dir == folder / "photos"
    assert dataset.resize_crop.resolution == 512
    assert dataset.resize_crop.minimum_aspect_ratio == 0.5
    assert dataset.resize_crop.crop_style == "center"
    assert (dataset.repeats, dataset.probability, dataset.max_num_samples) == (0, 1.0, None)


def test_every_field_arrives(folder: Path) -> None:
    fields = {
        "type": "local",
        "dataset_type": "image",
        "disabled": False,
        "disable": False,
        "caption_strategy": "instance_prompt",
        "instance_prompt": ["a", "b"],
        "prepend_instance_prompt": True,
        "only_instance_prompt": False,
        "caption_table": "t.csv",
        "disable_multiline_split": True,
        "resolution": 0.5,
        "resolution_type": "area",
        "crop": True,
        "crop_style": "centre",
        "crop_aspect": "closest",
        "crop_aspect_buckets": [0.5, 1],
        "minimum_aspect_ratio": 0.4,
        "maximum_aspect_ratio": 3,
        "minimum_image_size": 0.1,
        "maximum_image_size": 4,
        "target_downsample_size": 1.5,
        "max_upscale_threshold": 0.2,
        "conditioning_data": ["masks"],
        "alpha_mask": False,
        "is_regularisation_data": True,
        "regularisation_target": "images",
        "repeats": 9,
        "probability": 0.25,
        "max_num_samples": 7,
        "resolution_buckets": ["512x768", [768, 512]],
        "crops_per_image": 1,
        "train_batch_size": 3,
        "timestep_sampling_offset": -0.5,
        "start_epoch": 0,
        "start_step": 0,
        "end_epoch": 5,
        "end_step": 300,
        "caption_shuffle": {"enable": True, "count": 3, "split_on": "space", "position_start": 1},
        "caption_filter_list": ["x"],
        "caption_weights": [2],
        "exclude": ["a.png"],
        "crop_boxes": {"b.png": [1, 2, 64, 32]},
    }
    declared = {*COMMON_FIELDS, *IMAGE_FIELDS} - SOURCE_FIELDS.keys()
    assert set(fields) | {"id", "instance_data_dir"} == declared
    masks = {
        "id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask",
        "instance_data_dir": "photos", "source_dataset_id": "photos",
    }  # fmt: skip
    (dataset,) = read(folder, photos(**fields), masks).train
    framing = dataset.resize_crop
    assert dataset.masks is not None
    assert (dataset.masks.id, dataset.masks.instance_data_dir) == ("masks", folder / "photos")
    assert (dataset.regularisation_target, dataset.alpha_mask) == ("images", False)
    assert dataset.choices.excluded == ("a.png",)
    assert dataset.choices.boxes == (("b.png", (1, 2, 64, 32)),)
    assert dataset.caption_strategy == "instanceprompt"
    assert dataset.instance_prompts == ("a", "b")
    assert dataset.prepend_instance_prompt
    assert not dataset.only_instance_prompt
    assert dataset.disable_multiline_split
    assert (dataset.repeats, dataset.probability, dataset.max_num_samples) == (9, 0.25, 7)
    assert (framing.resolution, framing.resolution_type) == (0.5, "area")
    assert (framing.crop, framing.crop_style, framing.crop_aspect) == (True, "center", "closest")
    assert framing.crop_aspect_buckets == (0.5, 1)
    assert (framing.minimum_aspect_ratio, framing.maximum_aspect_ratio) == (0.4, 3)
    assert (framing.minimum_image_size, framing.maximum_image_size) == (0.1, 4)
    assert framing.target_downsample_size == 1.5
    assert framing.max_upscale_threshold == 0.2
    assert framing.resolution_buckets == ((512, 768), (768, 512))
    assert (framing.crops_per_image, framing.train_batch_size) == (1, 3)
    assert dataset.timestep_sampling_offset == -0.5
    assert dataset.active == ActivePeriod(1, 5, 0, 300)
    assert dataset.caption_variants == CaptionVariants(3, "space", 1)
    assert (dataset.caption_filters, dataset.caption_weights) == (("x",), (2.0,))


def test_prompts_of_the_environment_and_what_the_config_sets_is_told_once(folder: Path) -> None:
    (dataset,) = read(folder, photos(instance_prompt=["{env:PICTURES}"])).train
    assert dataset.instance_prompts == ("photos",)
    assert read(folder, photos(), minimum_aspect_ratio=5).train


def test_blank_is_not_given(folder: Path) -> None:
    blank = dict.fromkeys(
        {*IMAGE_FIELDS, *COMMON_FIELDS, *REFUSED_FIELDS} - {"id", "instance_data_dir"}, ""
    )
    assert read(folder, photos(**blank)).train == read(folder, photos()).train
    assert "instance_data_dir is missing" in problems(folder, photos(instance_data_dir=""))[0]


def test_a_folder_in_place_of_the_dataset_file(folder: Path) -> None:
    with pytest.raises(ConfigError, match="photos: cannot be read: is not a regular file"):
        read_dataset_file(folder / "photos", DataOptions(), {})


def test_a_typical_file(folder: Path) -> None:
    needless = {
        "skip_file_discovery": "vae,aspect",
        "delete_nsfw_images": False,
    }
    held = {
        "id": "held",
        "dataset_type": "eval",
        "instance_data_dir": "photos",
        "crop_style": "random",
    }
    text = {"id": "text", "type": "local", "dataset_type": "text_embeds", "cache_dir": "cache/text"}
    found = read(
        folder,
        photos(
            instance_data_dir="{env:PICTURES}",
            minimum_image_size=0,
            crop=True,
            max_num_samples=None,
        )
        | {"cache_dir_vae": "cache/vae"}
        | needless,
        held,
        {"id": "off", "instance_data_dir": "nowhere", "disabled": True, "nonsense": 1},
        text | {"default": True},
        {"id": "images", "dataset_type": "image_embeds", "cache_dir": "cache/images"},
    )
    assert [dataset.id for dataset in found.train] == ["photos"]
    assert found.train[0].resize_crop.crop_style == "random"
    assert found.train[0].resize_crop.minimum_image_size is None
    assert [(dataset.id, dataset.resize_crop.crop_style) for dataset in found.eval] == [
        ("held", "center")
    ]
    assert found.text_cache_dir == Path.cwd() / "cache" / "text"
    assert [note.split(" ")[0] for note in found.notices] == [
        "photos.cache_dir_vae", "photos.skip_file_discovery", "held.crop_style", "images.cache_dir",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [None, "", 1])
def test_an_unknown_field_is_reported_whatever_its_value(folder: Path, value: object) -> None:
    (problem,) = problems(folder, photos(repeat=value))
    assert problem.endswith("photos.repeat: unknown field; did you mean 'repeats'?")


def test_folders_beside_the_file_win(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = folder / "elsewhere"
    (elsewhere / "photos").mkdir(parents=True)
    (elsewhere / "more").mkdir()
    monkeypatch.chdir(elsewhere)
    (first, second) = read(folder, photos(), photos(id="more", instance_data_dir="more")).train
    assert first.instance_data_dir == folder / "photos"
    assert second.instance_data_dir == elsewhere / "more"


def test_all_problems_at_once_with_line_and_column(folder: Path) -> None:
    (folder / "multidatabackend.json").write_text(
        """[
  // three sets
  {"id": "a", "instance_data_dir": "pics", "repeat": 3,
   "resolution": "wide"},
  {"id": "a", "instance_data_dir": "photos", "crop_style": "face",},
  {"instance_data_dir": "{env:NOWHERE}"}
]"""
    )
    with pytest.raises(ConfigError) as error:
        read_dataset_file(folder / "multidatabackend.json", DataOptions(), {})
    found = [
        str(problem).removeprefix("multidatabackend.json:") for problem in error.value.problems
    ]
    assert found[0] == "3:44: a.repeat: unknown field; did you mean 'repeats'?"
    assert found[1] == '4:4: a.resolution = "wide": must be a number'
    assert found[2].startswith('3:15: a.instance_data_dir = "pics" does not exist (resolved to /')
    assert found[3] == '5:4: id = "a" is already used at multidatabackend.json:3:4'
    assert found[4].startswith(
        '5:46: a.crop_style = "face": face detection is not supported; allowed: center'
    )
    assert found[5].startswith('6:3: "id" is missing')
    assert found[6].startswith(
        "6:4: [2].instance_data_dir: {env:NOWHERE}: the environment variable"
    )
    assert len(found) == 7


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_fields_of_other_trainers_are_refused_by_name(name: str, folder: Path) -> None:
    (problem,) = problems(folder, photos(**{name: "something"}))
    assert f"photos.{name} is not supported: {REFUSED_FIELDS[name]}" in problem
    assert read(folder, photos(**{name: None})).train
    for value in HARMLESS_VALUES.get(name, ()):
        assert read(folder, photos(**{name: value})).train


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repeats": -1}, "repeats = -1: must be at least 0, at most 1000000 (extra passes)"),
        ({"repeats": 1.5}, "must be a whole number"),
        ({"repeats": True}, "must be a whole number"),
        ({"probability": 0}, "must be more than 0"),
        ({"resolution": 32}, "means pixels"),
        ({"resolution": 20000}, "at most 16384"),
        ({"resolution": 65, "resolution_type": "area"}, "means megapixels"),
        ({"repeats": 10**350}, "is too large"),
        (
            {"only_instance_prompt": True, "prepend_instance_prompt": True, "instance_prompt": "x"},
            "use one of them",
        ),
        ({"instance_data_dir": "x" * 5000}, "does not exist"),
        ({"instance_data_dir": "~nobody/x"}, "does not exist"),
        ({"instance_prompt": ["{env:NOWHERE}"]}, "NOWHERE is not set"),
        ({"crop": "rather"}, 'photos.crop = "rather": must be true or false'),
        ({"type": "aws"}, "aws_bucket_name is missing: the bucket of the images"),
        ({"dataset_type": "conditioning"}, "conditioning_type is missing"),
        ({"resolution_buckets": ["64x64"]}, 'needs "crop": true'),
        (
            {"crop": True, "crop_aspect": "random", "resolution_buckets": ["64x100"]},
            "multiples of 64",
        ),
        ({"crop": True, "crop_aspect": "random", "resolution_buckets": [[64]]}, "is not a size"),
        ({"crop": True, "crop_aspect": "random", "resolution_buckets": "x.json"}, "cannot be read"),
        ({"start_epoch": 3, "end_epoch": 2}, "end_epoch 2 is before start_epoch 3"),
        ({"start_step": 3, "end_step": 3}, "end_step 3 is not after start_step 3"),
        ({"start_epoch": 2}, "no dataset is active at first"),
        ({"crops_per_image": 65}, "at most 64"),
        ({"train_batch_size": -1}, "train_batch_size = -1: must be at least 1"),
        ({"caption_strategy": "csv"}, "caption_table: is missing: caption_strategy csv"),
        ({"caption_strategy": "txt"}, "allowed: textfile, filename, instanceprompt"),
        ({"caption_strategy": "instanceprompt"}, "instance_prompt is missing"),
        ({"prepend_instance_prompt": True}, "instance_prompt is missing"),
        ({"instance_prompt": ["a", " "]}, "instance_prompt: must not be empty"),
        ({"crop_aspect_buckets": [200]}, "must be less than or equal to 100"),
        ({"crop_aspect_buckets": [1.0]}, 'needs "crop": true'),
        ({"maximum_image_size": 2048}, "maximum_image_size: needs target_downsample_size"),
        ({"target_downsample_size": 2048}, "target_downsample_size: needs maximum_image_size"),
        (
            {"maximum_image_size": 900, "target_downsample_size": 2048},
            "must be between resolution (1024)",
        ),
        ({"minimum_aspect_ratio": 5}, "above maximum_aspect_ratio"),
        ({"resolution_type": "area"}, 'for the edge in pixels write "pixel_area"'),
        ({"resolution": 1.0}, 'for megapixels write "area"'),
        ({"id": "a/b"}, "slashes"),
        ({"default": True}, "is not a field of datasets with this dataset_type"),
        ({"instance_data_dir": "multidatabackend.json"}, "is not a folder"),
        ({"instance_data_dir": None}, "instance_data_dir is missing"),
        ({"disabled": True}, "nothing to train on"),
    ],
)
def test_one_problem_each(fields: dict[str, object], message: str, folder: Path) -> None:
    (problem,) = problems(folder, photos(**fields))
    assert message in problem


def test_placeholders_in_paths_are_filled_in(folder: Path) -> None:
    path = folder / "multidatabackend.json"
    entries = [
        photos(),
        {
            "id": "texts",
            "dataset_type": "text_embeds",
            "cache_dir": "{output_dir}/{env:PICTURES}/{model_family}/{id}",
        },
    ]
    path.write_text(json.dumps(entries))
    found = read_dataset_file(path, DataOptions(), {"PICTURES": "p"}, output_dir="/runs/one")
    assert found.text_cache_dir == Path("/runs/one/p/chroma/texts")


@pytest.mark.parametrize("storage", ["aws", "memory"])
def test_a_cache_elsewhere_is_read_as_local(folder: Path, storage: str) -> None:
    cache = {
        "id": "texts",
        "type": storage,
        "dataset_type": "text_embeds",
        "cache_dir": "texts",
        "aws_bucket_name": "mine",
        "memory_filesystem_size": "8G",
    }
    found = read(folder, photos(), cache)
    assert found.text_cache_dir is not None
    assert any(f"texts.type {storage} is not used" in note for note in found.notices)
    (problem,) = problems(folder, photos(type="memory"))
    assert "images are not read from memory" in problem


def test_other_mistakes(folder: Path) -> None:
    text = {"id": "t", "dataset_type": "text_embeds", "cache_dir": "{family}/x", "repeats": 1}
    assert len(problems(folder, photos(), text)) == 2
    twice = [{"id": name, "dataset_type": "text_embeds", "cache_dir": name} for name in "ab"]
    assert 'exactly one of them needs "default": true' in problems(folder, photos(), *twice)[0]
    assert "a dataset must be an object" in problems(folder, photos(), 3)[0]
    path = folder / "x.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="must hold a list of datasets"):
        read_dataset_file(path, DataOptions())
    with pytest.raises(ConfigError, match="no such dataset file"):
        read_dataset_file(folder / "none.json", DataOptions())
