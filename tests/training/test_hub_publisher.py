"""Uploads against a hub on loopback: retried, told, given up, and never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors import safe_open

from simpletuner.config.schema import PublishingOptions
from simpletuner.events.event_types import Event, NoticeIssued
from simpletuner.models.chroma import weights
from simpletuner.training import hub_publisher
from simpletuner.training.hub_publisher import HubPublisher, list_result_files
from tests.e2e.training_project import TrainingProject, read_events
from tests.training.upload_hub import TOKEN, UploadHub, serve_upload_hub

PAUSES = (0.02, 0.04, 0.08)
WAIT_S = 120


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    # The hub's own storage service speaks a protocol of its own; the one before it is what a stub
    # can speak.
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    # All clients of the process share one session. A connection in it to an earlier server, which had
    # the same port by chance, would make the first request fail.
    huggingface_hub.close_session()
    with serve_upload_hub() as served:
        yield served


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "my moons"
    for name, content in {
        "pytorch_lora_weights.safetensors": b"weights", "ema/pytorch_lora_weights.safetensors": b"average",
        "README.md": b"---\nlicense: apache-2.0\n---\n![x](images/step-000004/a.png)\n",
        "images/step-000004/a.png": b"new", "images/step-000000/a.png": b"old", "config.json": b"{}",
        "train.log": b"secret", "events.jsonl": b"secret", "checkpoint-4/weights.safetensors": b"state",
        ".pytorch_lora_weights.safetensors.7.tmp": b"half",
    }.items():  # fmt: skip
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    return run


def publisher(hub: UploadHub, run_dir: Path, told: list[Event], **more: object) -> HubPublisher:
    given = {"repo": "moons", "private": True, "retry_delays_s": PAUSES, "token": TOKEN, **more}
    api = HfApi(endpoint=hub.endpoint, token=given.pop("token"))
    return HubPublisher(run_dir, emit=told.append, api=api, **given)  # type: ignore[arg-type]


def test_weights_card_and_pictures_arrive_in_a_private_repository(
    hub: UploadHub, run_dir: Path
) -> None:
    told: list[Event] = []
    one = publisher(hub, run_dir, told)
    one.enqueue(
        [run_dir / "checkpoint-4" / "weights.safetensors", run_dir / "gone.safetensors"],
        "checkpoint-4",
    )
    one.enqueue(list_result_files(run_dir), "weights")
    assert one.wait(WAIT_S)
    assert hub.repos == {"ada/moons": True}
    assert hub.commits == ["checkpoint-4", "weights"]
    assert hub.files["ada/moons"] == {
        "checkpoint-4/weights.safetensors": b"state",
        "pytorch_lora_weights.safetensors": b"weights", "ema/pytorch_lora_weights.safetensors": b"average",
        "README.md": (run_dir / "README.md").read_bytes(), "images/step-000004/a.png": b"new",
    }  # fmt: skip
    assert [type(event) for event in told] == [NoticeIssued] * 3
    assert "publishing to ada/moons, private" in str(told[0])
    assert "4 files" in str(told[2])


def test_a_stumbling_hub_is_asked_again(hub: UploadHub, run_dir: Path) -> None:
    hub.faults += [500, 500]
    told: list[Event] = []
    one = publisher(hub, run_dir, told)
    one.enqueue(list_result_files(run_dir), "weights")
    assert one.wait(WAIT_S)
    assert "answered 500: " in str(told[0])
    assert "next attempt in 0.02 s" in str(told[0])
    assert "next attempt in 0.04 s" in str(told[1])
    assert len(told) == 4
    assert hub.commits == ["weights"]


def test_what_fails_for_good_says_how_to_publish_later(hub: UploadHub, run_dir: Path) -> None:
    hub.faults += 2 * [500] * (len(PAUSES) + 1)
    told: list[Event] = []
    one = publisher(hub, run_dir, told)
    one.enqueue(list_result_files(run_dir), "checkpoint-2")
    one.enqueue(list_result_files(run_dir), "weights")
    assert one.wait(WAIT_S), "the next one is tried all the same"
    assert hub.commits == ["weights"]
    last = str(told[2 * len(PAUSES) + 1])
    assert "not published" in last
    assert "simpletuner publish" in last


def test_a_token_that_may_not_write_is_told_at_once(hub: UploadHub, run_dir: Path) -> None:
    told: list[Event] = []
    one = publisher(hub, run_dir, told, token="hf_wrongcanary", retry_delays_s=(60.0,))
    one.enqueue(list_result_files(run_dir), "weights")
    assert not one.wait(WAIT_S)
    assert "once more" not in str(told), "asking again would not help"
    assert len(told) == 2, "at the start, and once more at the end"
    assert "401: the token may not write there" in str(told)
    assert "wrongcanary" not in str(told)


def test_a_hanging_hub_is_not_waited_for_longer_than_said(hub: UploadHub, run_dir: Path) -> None:
    hub.hang.set()
    told: list[Event] = []
    one = publisher(hub, run_dir, told)
    one.enqueue(list_result_files(run_dir), "weights")
    assert not one.wait(0.2)
    assert "not finished after 0 s" in str(told)
    hub.release.set()
    one._queue.join()
    assert hub.commits == ["weights"]
    assert len(told) == 1, "nothing is told after the end"


def test_a_hanging_upload_does_not_delay_the_next(
    hub: UploadHub, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline is only short here; the next one then has all the time it needs."""
    told: list[Event] = []
    one = publisher(hub, run_dir, told)
    assert one.wait(WAIT_S)
    hub.hang.set()
    monkeypatch.setattr(hub_publisher, "UPLOAD_BASE_TIMEOUT_S", 0.3)
    one.enqueue(list_result_files(run_dir), "checkpoint-2")
    assert not one.wait(WAIT_S)
    assert "no answer from the hub in 0 s (checkpoint-2)" in str(told[-1])
    assert "next attempt" not in str(told)
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    hub.hang.clear()
    one.enqueue(list_result_files(run_dir), "weights")
    assert one.wait(WAIT_S)
    assert "weights" in hub.commits


def test_one_can_leave_while_it_uploads(hub: UploadHub, run_dir: Path) -> None:
    hub.hang.set()
    one = publisher(hub, run_dir, [])
    one.enqueue(list_result_files(run_dir), "weights")
    asked = threading.Event()
    threading.Timer(0.1, asked.set).start()
    assert not one.wait(WAIT_S, asked.is_set)


def test_nothing_private_goes_into_a_public_repository(hub: UploadHub, run_dir: Path) -> None:
    hub.repos["ada/moons"] = False
    told: list[Event] = []
    one = publisher(hub, run_dir, told)
    one.enqueue(list_result_files(run_dir), "weights")
    assert not one.wait(WAIT_S)
    assert "is a public repository and model_card_private is true" in str(told)
    assert hub.files == {}
    one = publisher(hub, run_dir, told, private=False)
    one.enqueue(list_result_files(run_dir), "weights")
    assert one.wait(WAIT_S)


def test_the_runs_name_serves_as_the_repositorys(run_dir: Path) -> None:
    assert hub_publisher.repository_name(PublishingOptions(), run_dir) == "my-moons"
    assert hub_publisher.repository_name(PublishingOptions(hub_model_id="a/b"), run_dir) == "a/b"


def test_a_run_publishes_its_checkpoints_and_its_end(
    hub: UploadHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_publisher, "HfApi", partial(HfApi, endpoint=hub.endpoint, token=TOKEN))
    workspace = TrainingProject(tmp_path)
    options = {"push_to_hub": True, "push_checkpoints_to_hub": True, "hub_model_id": "ada/moons"}
    run = workspace.train(max_train_steps=4, use_ema=False, **options)
    held = hub.files["ada/moons"]
    lora = "pytorch_lora_weights.safetensors"
    both = (lora, "pytorch_lora_weights.kohya.safetensors")
    folders = ("", "checkpoint-2/", "checkpoint-4/")
    assert held.keys() == {"README.md", *(f"{place}{name}" for place in folders for name in both)}
    assert held[lora] == (run / lora).read_bytes()
    assert read_events(run)[-1] == NoticeIssued(
        f"{both[1]}: for kohya sd-scripts, Forge and ComfyUI"
    )
    assert read_events(run)[-2] == NoticeIssued(f"{lora}: for diffusers and ComfyUI")
    assert not any(str(tmp_path).encode() in content for content in held.values())
    told = [event.message for event in read_events(run) if isinstance(event, NoticeIssued)]
    assert len([text for text in told if text.startswith("publish")]) == 4, told


def test_a_run_is_not_touched_by_a_hub_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        hub_publisher, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token=TOKEN)
    )
    monkeypatch.setattr(hub_publisher, "upload_timeout_s", lambda _: 0.5)
    out = str(tmp_path / "unreachable")
    run = TrainingProject(tmp_path).train(
        max_train_steps=1, use_ema=False, push_to_hub=True, output_dir=out
    )
    assert (run / "pytorch_lora_weights.safetensors").is_file()
    assert '"done"' in (run / "exit.json").read_text()
    assert "later: simpletuner publish unreachable" in (run / "train.log").read_text()


def test_full_rank_writes_the_native_file_too(tmp_path: Path) -> None:
    run = TrainingProject(tmp_path).train(
        model_type="full", save_native_file=True, max_train_steps=2, checkpoint_step_interval=2,
        modelspec_title="Moons", lora_rank=16, lora_dropout=0.0,
    )  # fmt: skip
    for name in ("transformer", "transformer_ema"):
        file = run / f"{name}_native.safetensors"
        ours, native = weights.transformer_tensors(run / name), weights.transformer_tensors(file)
        assert ours.keys() == native.keys()
        assert all(torch.equal(ours[key].load(), native[key].load()) for key in ours)
        with safe_open(file, framework="pt") as opened:
            told = opened.metadata()
        assert (told["modelspec.architecture"], told["modelspec.title"]) == ("chroma", "Moons")
        assert "ss_network_dim" not in told
    assert "ChromaTransformer2DModel.from_pretrained" in (run / "README.md").read_text()
    assert len([path for path in list_result_files(run) if "native" in path.name]) == 2


def test_the_command_publishes_later(hub: UploadHub, run_dir: Path) -> None:
    environ = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "simpletuner",
        "publish",
        str(run_dir),
        "--repo",
        "club/moons",
        "--public",
    ]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "club/moons\n"
    assert hub.repos == {"club/moons": False}
    assert len(hub.files["club/moons"]) == 4
    done = subprocess.run(
        [*command[:4], str(run_dir / "images")],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "has no final weights" in done.stderr
    assert hub.endpoint != constants.ENDPOINT
