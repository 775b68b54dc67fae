from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from simpletuner.config.schema import ModelOptions
from simpletuner.errors import DownloadError, ModelError
from simpletuner.models.chroma import sources


def answer(kind: type[Exception]) -> Exception:
    return kind("no", response=SimpleNamespace(headers={}, request=None))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, object]]]:
    """Stands in for the hub: what asking says, what downloading says, and what was asked for."""

    def install(asked: Exception | str, fetched: Exception | Path) -> list[dict[str, object]]:
        calls: list[dict[str, object]] = []

        class Api:
            def model_info(self, repo: str, **arguments: object) -> SimpleNamespace:
                if isinstance(asked, Exception):
                    raise asked
                return SimpleNamespace(sha=asked)

        def fetch(repo: str, **arguments: object) -> str:
            calls.append({"repo": repo, **arguments})
            if isinstance(fetched, Exception):
                raise fetched
            return str(fetched)

        monkeypatch.setattr(sources, "HfApi", Api)
        monkeypatch.setattr(sources, "snapshot_download", fetch)
        return calls

    return install


def test_a_local_folder_is_taken_as_it_lies(checkpoint: Path) -> None:
    source = sources.locate(ModelOptions(pretrained_model_name_or_path=str(checkpoint)))
    assert source.transformer == checkpoint / "transformer"
    assert (source.tokenizer, source.revision, source.variant) == (checkpoint / "tokenizer", "", "")


@pytest.mark.parametrize("nested", [True, False])
def test_parts_may_come_from_elsewhere(checkpoint: Path, tmp_path: Path, nested: bool) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    source = sources.locate(
        ModelOptions(
            pretrained_model_name_or_path=str(checkpoint),
            pretrained_transformer_model_name_or_path=str(other if nested else other / "transformer"),
            pretrained_t5_model_name_or_path=str(other if nested else other / "text_encoder"),
        )
    )
    assert source.transformer == other / "transformer"
    assert source.text_encoder == other / "text_encoder"
    assert source.tokenizer == (other if nested else checkpoint) / "tokenizer"
    assert source.vae == checkpoint / "vae"


def test_an_incomplete_folder_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "half"))
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match="half/vae is no vae folder"):
        sources.locate(ModelOptions(pretrained_model_name_or_path=str(folder)))


@pytest.mark.parametrize("name", ["chroma.safetensors", "owner/chroma-q8.gguf", "./model.pt"])
def test_single_files_are_refused_with_what_to_give_instead(name: str) -> None:
    with pytest.raises(ModelError, match=r"not read yet.*diffusers"):
        sources.locate(ModelOptions(pretrained_model_name_or_path=name))


def test_a_mistyped_folder_is_no_repository() -> None:
    with pytest.raises(ModelError, match="neither a folder that exists nor a hub repository"):
        sources.locate(ModelOptions(pretrained_model_name_or_path="./models/my-chroma"))


@pytest.mark.parametrize(
    ("flavour", "repo"),
    [
        ("base", "lodestones/Chroma1-Base"),
        ("hd", "lodestones/Chroma1-HD"),
        ("flash", "lodestones/Chroma1-Flash"),
    ],
)
def test_flavours_download_only_the_parts(hub: Callable, checkpoint: Path, flavour: str, repo: str) -> None:
    calls = hub("c0ffee", checkpoint)
    source = sources.locate(ModelOptions(model_flavour=flavour))
    assert (source.name, source.revision) == (repo, checkpoint.name)
    assert calls[0]["repo"] == repo
    assert calls[0]["revision"] == "c0ffee"
    patterns = calls[0]["allow_patterns"]
    assert "transformer/*.safetensors" in patterns
    assert not any(pattern in ("*.safetensors", "*") for pattern in patterns)  # no 18 GB single file


def test_a_separate_part_is_not_downloaded_twice(hub: Callable, checkpoint: Path) -> None:
    calls = hub("c0ffee", checkpoint)
    sources.locate(ModelOptions(pretrained_transformer_model_name_or_path=str(checkpoint / "transformer")))
    assert len(calls) == 1
    assert not any(pattern.startswith("transformer/") for pattern in calls[0]["allow_patterns"])


@pytest.mark.parametrize(
    ("asked", "fetched", "said"),
    [
        (ConnectionError("no route"), LocalEntryNotFoundError("x"), "cannot be reached.*HF_ENDPOINT=https://hf-mirror.com"),
        (answer(GatedRepoError), OSError(), "gated: accept its licence.*HF_TOKEN"),
        (answer(RepositoryNotFoundError), OSError(), "does not exist"),
        ("c0ffee", answer(GatedRepoError), "gated"),
        ("c0ffee", ConnectionError("reset by peer"), "broke off.*reset by peer"),
    ],
)  # fmt: skip
def test_every_failure_is_one_line_with_a_way_out(
    hub: Callable, asked: Exception | str, fetched: Exception, said: str
) -> None:
    hub(asked, fetched)
    with pytest.raises(DownloadError, match=said) as caught:
        sources.locate(ModelOptions())
    assert "\n" not in str(caught.value)


def test_without_network_the_hub_cache_serves(hub: Callable, checkpoint: Path) -> None:
    calls = hub(ConnectionError("no route"), checkpoint)
    assert sources.locate(ModelOptions()).vae == checkpoint / "vae"
    assert calls[0]["local_files_only"] is True


def test_a_dead_endpoint_is_noticed_in_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real call, to a port where nobody listens."""
    monkeypatch.setattr(sources.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(sources.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        sources.locate(ModelOptions())
    assert time.monotonic() - started < 10
