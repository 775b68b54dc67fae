"""What a file and its card tell of a run: enough for people, and nothing of the machine it was made
on.
"""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from simpletuner.data.sample_types import BucketedSample, Sample
from simpletuner.data.sources import LocalFile
from simpletuner.events.event_types import NoticeIssued
from simpletuner.training import model_metadata
from tests.e2e.training_project import TrainingProject, read_events

CANARY = "canary7f3a"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run in folders, environment and options full of what must not leave the machine."""
    root = tmp_path_factory.mktemp(f"home-{CANARY}")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "USER", "LOGNAME", "HOSTNAME", "WANDB_API_KEY"):
            patch.setenv(name, f"hf_{CANARY}")
        workspace = TrainingProject(root)
        return workspace.train(
            output_dir=str(root / "moons"), max_train_steps=4, num_validation_images=1,
            validation_disable=False, validation_prompt="a red | moon", validation_num_inference_steps=2,
            validation_step_interval=2, validation_resolution="64", validation_strengths="none",
            modelspec_author="Ada", modelspec_comment="Moons at night", modelspec_trigger="zorbo moon",
            model_card_note="Drawn by hand.", model_card_safe_for_work=True, lora_format="kohya",
            tracker_run_name=CANARY, cache_dir=str(root / f"cache-{CANARY}"),
            webhook_config={
                "webhook_type": "raw", "webhook_url": "http://127.0.0.1:9/", "auth_token": CANARY,
            },
        )  # fmt: skip


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_every_file_says_what_it_is(run_dir: Path) -> None:
    paths = sorted(run_dir.rglob("*.safetensors"))
    loras = [path for path in paths if path.name.startswith("pytorch_lora_weights")]
    assert len(loras) == 4 * (1 + 2), (
        "default, kohya, and the average of both; at the top and in two checkpoints"
    )
    for path in loras:
        told = header(path)
        step = path.parent.name if path.parent.name != "ema" else path.parent.parent.name
        assert told["ss_steps"] == (
            step.removeprefix("checkpoint-") if "checkpoint" in step else "4"
        )
        assert told["modelspec.architecture"] == "chroma/lora"
        assert told["modelspec.title"] == "moons"
        assert told["modelspec.author"] == "Ada"
        assert told["modelspec.trigger_phrase"] == "zorbo moon"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told["modelspec.date"])
        assert re.fullmatch(r"\d+x\d+", told["modelspec.resolution"])
        assert (told["ss_network_dim"], told["ss_learning_rate"]) == ("2", "0.01")
        assert told["base_model"] == "base"
        assert re.fullmatch(r"[0-9a-f]{16}", told["training_config_hash"])
        tags = json.loads(told["ss_tag_frequency"])
        assert tags["photos"]["a red square"] == 2
        assert sum(tags["photos"].values()) == 2 * 6, "two captions each"


def test_the_thumbnail_is_the_newest_picture(run_dir: Path) -> None:
    picture = model_metadata.latest_validation_image(run_dir, 4)
    assert picture is not None
    assert picture.parent.name == "step-000004"
    earlier = model_metadata.latest_validation_image(run_dir, 3)
    assert earlier is not None
    assert earlier.parent.name == "step-000002"
    assert model_metadata.latest_validation_image(run_dir, 1) is None, (
        "the untouched base shows nothing of the LoRA"
    )
    address = header(run_dir / "pytorch_lora_weights.safetensors")["modelspec.thumbnail"]
    shown = Image.open(
        io.BytesIO(base64.b64decode(address.removeprefix("data:image/jpeg;base64,")))
    )
    assert (shown.format, shown.size) == ("JPEG", (64, 64))


def test_a_thumbnail_of_noise_stays_small(tmp_path: Path) -> None:
    Image.effect_noise((2048, 1024), 255).convert("RGB").save(tmp_path / "x.png")
    address = model_metadata.thumbnail_data_url(tmp_path / "x.png")
    assert 1000 < len(address) <= 64 << 10
    (tmp_path / "y.png").write_bytes(b"\x89PNG broken")
    assert model_metadata.thumbnail_data_url(tmp_path / "y.png") == ""


def test_the_card_shows_how_to_use_it(run_dir: Path) -> None:
    text = (run_dir / "README.md").read_text()
    matter, body = text.split("---\n")[1:3]
    front = dict(line.split(": ", 1) for line in matter.splitlines())
    fields = {key: json.loads(value) for key, value in front.items()}
    assert fields["pipeline_tag"] == "text-to-image"
    assert {"lora", "chroma", "safe-for-work"} <= set(fields["tags"])
    assert fields["instance_prompt"] == "zorbo moon"
    assert "base_model" not in fields, "a folder's name means nothing to the hub"
    assert [one["text"] for one in fields["widget"]] == ["a red | moon"] * len(fields["widget"])
    assert fields["widget"]
    for one in fields["widget"]:
        assert (run_dir / one["output"]["url"]).is_file()
    for words in (
        "load_lora_weights",
        "ComfyUI",
        "Forge",
        "weights.kohya",
        "Drawn by hand",
        "`zorbo moon`",
    ):
        assert words in body
    assert "| `learning_rate` | `0.01` |" in body
    assert "![a red \\| moon](images/step-000004/" in body


def test_nothing_tells_of_the_machine(run_dir: Path) -> None:
    """Every file that is meant for others, byte by byte."""
    given_away = [*run_dir.rglob("pytorch_lora_weights*.safetensors"), run_dir / "README.md"]
    given_away += run_dir.glob("images/**/*.png")
    assert len(given_away) > 14
    for path in given_away:
        content = path.read_bytes()
        for secret in (CANARY, str(run_dir.parent), "/tmp", "webhook"):
            assert secret.encode() not in content, f"{secret} in {path.name}"
    assert CANARY in (run_dir / "config.json").read_text(), "the canaries were there to be found"


def test_publishing_is_not_begun_unasked(run_dir: Path) -> None:
    assert not [
        event
        for event in read_events(run_dir)
        if isinstance(event, NoticeIssued) and "publish" in event.message
    ]


def test_tags_are_short_and_of_datasets_by_name() -> None:
    sample = Sample(
        "d/1", "d", LocalFile(Path("/x")), 1, 1, ("moon, night", f"moon, {'long ' * 20}")
    )
    samples = [BucketedSample(sample, (1, 1), (0, 0), (64, 64))]
    assert model_metadata.tag_frequency(samples * 3) == {"d": {"moon": 3, "night": 3}}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("lodestones/Chroma1-HD", "lodestones/Chroma1-HD"),
        ("/home/ada/x", "x"),
        ("./a/b", "b"),
        ("C:\\u\\m", "m"),
    ],
)
def test_a_base_is_named_without_its_place(name: str, shown: str) -> None:
    assert model_metadata.public_name(name) == shown
