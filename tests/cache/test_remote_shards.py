"""Copies of shards in an object store: what one machine encoded, another one does not encode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.cache import remote_shards
from simpletuner.cache.remote_shards import RemoteShards
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.data.object_store import ObjectTransport
from simpletuner.data.transports import TransferError
from simpletuner.errors import CacheError
from simpletuner.events.event_types import Event, NoticeIssued, WarningIssued
from tests.data.conftest import bucket, endpoint

__all__ = ["bucket", "endpoint"]
TENSOR = torch.arange(6.0)


@pytest.fixture
def address(bucket: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of a bucket, whose service and keys are in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id-canary")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-canary")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(remote_shards, "FIRST_WAIT_S", 0)
    return f"s3://{bucket()['aws_bucket_name']}/caches/mine"


@pytest.fixture
def machine(address: str, tmp_path: Path) -> Callable[..., TensorStore]:
    def open_store(name: str, events: list[Event] | None = None, **options: Any) -> TensorStore:
        emit = (events if events is not None else []).append
        remote = RemoteShards(address, options.get("fingerprint", "f"), emit)
        return TensorStore(
            tmp_path / name, "f", emit, shares_index=options.get("main", True), remote=remote
        )

    return open_store


def keys_of(store: TensorStore, *keys: str) -> list[str]:
    return [key for key in keys if key not in store.missing_keys(keys)]


def test_another_machine_fetches_what_was_encoded(machine: Callable[..., TensorStore]) -> None:
    with machine("first") as store:
        store.put("a", {"moments": TENSOR})
    events: list[Event] = []
    with machine("second", events) as store:
        assert store.missing_keys(["b"]) == ["b"]
        assert list(store.folder.glob("shard-*")) == [], "no shard has the key, so none is fetched"
        assert store.missing_keys(["b", "a"]) == ["b"]
        assert torch.equal(store.get("a")["moments"], TENSOR)
        store.put("b", {"moments": TENSOR + 1})
    (notice,) = (event for event in events if isinstance(event, NoticeIssued))
    assert "cache files fetched from s3://" in notice.message
    assert "/caches/mine/" in notice.message
    with machine("third") as store:
        assert keys_of(store, "a", "b") == ["a", "b"]
        assert torch.equal(store.get("b")["moments"], TENSOR + 1)


def test_what_was_encoded_before_is_copied_at_the_next_start(
    machine: Callable[..., TensorStore], tmp_path: Path
) -> None:
    with TensorStore(tmp_path / "first", "f") as store:
        store.put("a", {"moments": TENSOR})
    machine("first").close()
    with machine("second") as store:
        assert keys_of(store, "a") == ["a"]


def test_the_other_processes_of_a_run_find_what_the_main_one_fetched(
    machine: Callable[..., TensorStore],
) -> None:
    with machine("first") as store:
        store.put("a", {"moments": TENSOR})
    with machine("second") as main, machine("second", main=False) as other:
        assert other.missing_keys(["a"]) == ["a"], "only the main process asks the store"
        assert main.missing_keys(["a"]) == []
        assert torch.equal(other.get("a")["moments"], TENSOR)
        with pytest.raises(KeyError):
            other.get("b")


def test_another_fingerprint_has_its_own_copies(machine: Callable[..., TensorStore]) -> None:
    with machine("first") as store:
        store.put("a", {"moments": TENSOR})
    with machine("second", fingerprint="g") as store:
        assert store.missing_keys(["a"]) == ["a"]


def test_a_damaged_copy_is_not_used(
    machine: Callable[..., TensorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine("first") as store:
        store.put("a", {"moments": TENSOR})
    real = ObjectTransport.download

    def damaged(transport: ObjectTransport, location: str, copy: Any) -> None:
        real(transport, location, copy)
        copy.file.seek(-1, 2)
        copy.file.write(b"\xff")

    monkeypatch.setattr(ObjectTransport, "download", damaged)
    events: list[Event] = []
    with machine("second", events) as store:
        assert store.missing_keys(["a"]) == ["a"]
        assert [path.name for path in store.folder.glob("shard-*")] == []
    assert "is damaged and not used" in str(events)


def test_a_store_that_fails_now_and_then_is_asked_again(
    machine: Callable[..., TensorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ObjectTransport.call
    fails = iter([True, False] * 20)

    def call(transport: ObjectTransport, name: str, *values: Any, **named: Any) -> Any:
        if next(fails):
            raise TransferError("cut", permanent=False)
        return real(transport, name, *values, **named)

    monkeypatch.setattr(ObjectTransport, "call", call)
    with machine("first") as store:
        store.put("a", {"moments": TENSOR})
    with machine("second") as store:
        assert keys_of(store, "a") == ["a"]


def test_a_store_that_does_not_answer_is_not_needed(
    machine: Callable[..., TensorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*values: Any, **named: Any) -> Any:
        raise TransferError("no answer in time", permanent=False)

    monkeypatch.setattr(ObjectTransport, "call", call)
    events: list[Event] = []
    with machine("first", events) as store:
        store.put("a", {"moments": TENSOR})
        assert store.missing_keys(["a"]) == []
    (warning,) = (event.message for event in events if isinstance(event, WarningIssued))
    assert "is not used in this run: no answer in time" in warning


def test_a_store_that_refuses_is_an_error(tmp_path: Path, address: str) -> None:
    remote = RemoteShards("s3://nobody-has-this-bucket/x", "f", lambda event: None)
    with pytest.raises(CacheError, match="cache_remote: s3://nobody-has-this-bucket/x/"):
        TensorStore(tmp_path, "f", remote=remote)
