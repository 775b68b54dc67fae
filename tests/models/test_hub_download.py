"""Downloads from a hub of our own, over HTTP, by the hub's own library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError, DiskFull, DownloadError, ModelError
from simpletuner.events.event_types import StageCompleted, StageStarted
from simpletuner.models.chroma import model_files
from simpletuner.models.weights import hub_download
from simpletuner.models.weights.evaluation_files import (
    locate_evaluation_model,
    measure_evaluation_model,
)
from simpletuner.validation.evaluation_model import EvaluationModel
from tests.e2e.training_project import TrainingProject
from tests.models.download_hub import COMMIT, DownloadHub, serve_download_hub
from tests.models.tiny_evaluation_models import make_clip

OPTIONS = ModelOptions(pretrained_model_name_or_path="owner/chroma")
UNWANTED = (
    "model-all-in-one.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "pic.png",
)


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DownloadHub]:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "repository"))
    for name in UNWANTED:
        (folder / name).write_bytes(b"x" * 1000)
    with serve_download_hub(DownloadHub(folder)) as hub:
        aim(monkeypatch, hub.url, tmp_path / "cache")
        yield hub


def aim(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HOME do before the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 1000
    )  # what is kept of a file that is cut
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time.sleep", lambda _: None
    )  # between its attempts


def test_only_what_is_needed_comes_and_is_told(hub: DownloadHub, checkpoint: Path) -> None:
    said: list[object] = []
    source = model_files.locate_files(OPTIONS, said.append)
    assert (source.revision, source.transformer.parent.name) == (COMMIT, COMMIT)
    for part in ("transformer", "vae", "text_encoder"):
        for file in (checkpoint / part).iterdir():
            assert (getattr(source, part) / file.name).read_bytes() == file.read_bytes()
    assert not hub.fetched_files() & set(UNWANTED)
    assert "transformer/diffusion_pytorch_model.safetensors" in hub.fetched_files()
    weights = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors")) // 10**6
    begun, done = said[0], said[-1]
    assert isinstance(begun, StageStarted)
    assert isinstance(done, StageCompleted)
    assert (begun.stage, begun.total, done.done) == ("download owner/chroma", weights, weights)
    hub.requests.clear()
    said.clear()
    assert model_files.locate_files(OPTIONS, said.append) == source  # from the cache
    assert (hub.fetched_files(), said) == (set(), [])


def test_a_revision_is_asked_for_by_its_name(hub: DownloadHub) -> None:
    source = model_files.locate_files(OPTIONS.model_copy(update={"revision": "v2"}))
    assert source.revision == COMMIT
    assert ("GET", "/api/models/owner/chroma/revision/v2", "") in hub.requests
    with pytest.raises(DownloadError, match="has no revision 'v3'"):
        model_files.locate_files(OPTIONS.model_copy(update={"revision": "v3"}))


def test_a_file_cut_in_the_middle_goes_on_where_it_broke_off(hub: DownloadHub) -> None:
    hub.fault, hub.fault_count = "cut", 1
    model_files.locate_files(OPTIONS)
    assert any(span for _, path, span in hub.requests if "/cdn/" in path)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("401", r"does not accept the token of HF_TOKEN.*\(401\)"),
        ("429", r"too many requests \(429\); wait"),
        ("500", r"cannot be reached.*500.*HF_ENDPOINT=https://hf-mirror\.com"),
        ("gated", "owner/chroma is gated: accept its licence on http.*HF_TOKEN"),
        ("cut", "The download of owner/chroma was interrupted .*Run the same command again"),
        ("short", "The download of owner/chroma was interrupted .*[Cc]onsistency"),
        ("long", "The download of owner/chroma was interrupted .*[Cc]onsistency"),
    ],
)
def test_each_fault_is_told_as_that(hub: DownloadHub, fault: str, said: str) -> None:
    hub.fault = fault
    with pytest.raises(DownloadError, match=said) as caught:
        model_files.locate_files(OPTIONS)
    assert "\n" not in str(caught.value)
    hub.fault = ""
    assert model_files.locate_files(OPTIONS).vae.is_dir()  # the same command resumes


def test_a_repository_that_is_not_there(hub: DownloadHub) -> None:
    with pytest.raises(DownloadError, match=r"owner/other does not exist on http://127\.0\.0\.1"):
        model_files.locate_files(ModelOptions(pretrained_model_name_or_path="owner/other"))


def test_what_is_not_chroma_costs_no_weights(hub: DownloadHub) -> None:
    config = hub.folder / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ModelError, match="FluxTransformer2DModel"):
        model_files.locate_files(OPTIONS)
    assert not [name for name in hub.fetched_files() if name.endswith(".safetensors")]


def test_a_disk_too_small_is_told_before_the_first_byte(
    hub: DownloadHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match=r"needs .* GB and 0\.0 GB are free.*HF_HOME"):
        model_files.locate_files(OPTIONS)
    assert not [name for name in hub.fetched_files() if name.endswith(".safetensors")]


def test_a_hub_that_goes_away_between_two_questions(
    hub: DownloadHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library may then hand back what the cache has, without a word."""
    honest = hub_download.snapshot_download

    def handed_back(repo: str, allow_patterns: list[str], **more: object) -> str:
        there = [name for name in allow_patterns if not name.endswith(".safetensors")]
        return honest(repo, allow_patterns=there or ["model_index.json"], **more)

    with monkeypatch.context() as patch:
        patch.setattr(hub_download, "snapshot_download", handed_back)
        with pytest.raises(
            DownloadError, match=r"was interrupted before .*safetensors.*Run the same command again"
        ):
            model_files.locate_files(OPTIONS)
    assert model_files.locate_files(OPTIONS).vae.is_dir()


def test_an_evaluation_model_comes_once_and_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_clip(tmp_path / "repository")
    for name in ("pytorch_model.bin", "flax_model.msgpack", "modeling_clip.py"):
        (folder / name).write_bytes(b"x" * 1000)
    name = "owner/clip"
    with serve_download_hub(DownloadHub(folder, repo=name)) as hub:
        aim(monkeypatch, hub.url, tmp_path / "cache")
        assert measure_evaluation_model(name).is_assumed
        found = locate_evaluation_model(name, "clip", lambda event: None)
        assert (found / "model.safetensors").is_file()
        assert "model.safetensors" in hub.fetched_files()
        assert not hub.fetched_files() & {
            "pytorch_model.bin", "flax_model.msgpack", "modeling_clip.py",
        }  # fmt: skip
        hub.requests.clear()
        assert locate_evaluation_model(name, "clip", lambda event: None) == found
        assert hub.fetched_files() == set()
        (folder / "config.json").write_text('{"model_type": "bert"}')
    # The hub is gone.
    assert locate_evaluation_model(name, "clip", lambda event: None) == found
    assert EvaluationModel(found, torch.device("cpu")).max_tokens == 77


def test_an_evaluation_model_of_another_kind_costs_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_clip(tmp_path / "repository")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with serve_download_hub(DownloadHub(folder, repo="owner/bert")) as hub:
        aim(monkeypatch, hub.url, tmp_path / "cache")
        with pytest.raises(ConfigError, match="owner/bert is a model of type 'bert'"):
            locate_evaluation_model("owner/bert", "clip", lambda event: None)
        assert "model.safetensors" not in hub.fetched_files()


def test_without_answer_the_cache_serves(hub: DownloadHub) -> None:
    source = model_files.locate_files(OPTIONS)
    hub.fault = "429"
    assert model_files.locate_files(OPTIONS) == source


@pytest.mark.slow
def test_trainings_from_a_hub_from_end_to_end(tmp_path: Path) -> None:
    """`simpletuner train` in a process of its own, told by the environment alone; its exit codes."""
    workspace = TrainingProject(
        tmp_path, max_train_steps=2, pretrained_model_name_or_path="owner/chroma"
    )
    workspace.load_config()

    def run(url: str, out: str, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
        cleared = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = cleared | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), **more}
        words = ["train", "--config", str(workspace.root / "config.json"), *flags]
        return subprocess.run(
            [sys.executable, "-m", "simpletuner", *words, f"--output_dir={tmp_path / out}"],
            env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False,
        )  # fmt: skip

    with serve_download_hub(DownloadHub(workspace.base_model_dir, token="secret")) as hub:
        refused = run(hub.url, "refused")
        assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (6, 1), (
            refused.stderr
        )
        assert "HF_TOKEN" in refused.stderr
        done = run(hub.url, "done", HF_TOKEN="secret")
        assert done.returncode == 0, done.stderr + done.stdout
        assert "secret" not in done.stderr + done.stdout
        assert (tmp_path / "done" / "pytorch_lora_weights.safetensors").is_file()
    offline = run(hub.url, "offline", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr + offline.stdout
    other = "--pretrained_model_name_or_path=owner/other"
    for more, said in (
        ({}, "http://127.0.0.1:9 cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
    ):
        silent = run("http://127.0.0.1:9", "silent", other, **more)
        assert (silent.returncode, said in silent.stderr) == (6, True), (
            silent.stderr + silent.stdout
        )
