"""Requests for images as files: their order, their states, and when the process ends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest

pytest.importorskip("torch", reason="a network generates")

from simpletuner.cli.generation_requests import (
    CLOSED_FILE,
    STOP_FILE,
    pending_requests,
    serve_requests,
)
from simpletuner.cli.kept_network import KeptNetwork
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import DataError


def add(folder: Path, name: str, order: int) -> Path:
    path = folder / name
    path.mkdir()
    command = path / "command.json"
    command.write_text(json.dumps([f"--prompt={name}"]))
    os.utime(command, (order, order))
    return path


def state(path: Path) -> dict[str, str]:
    read: dict[str, str] = json.loads((path / "state.json").read_text())
    return read


class Clock:
    """Time that passes only while the process sleeps. at: what happens at which second."""

    def __init__(self, at: dict[int, Callable[[], object]] | None = None) -> None:
        self.now, self.at = 0, at or {}

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 1
        self.at.get(self.now, lambda: None)()


def test_requests_are_generated_in_order_until_none_comes(tmp_path: Path) -> None:
    first, second = add(tmp_path, "b", 1), add(tmp_path, "a", 2)
    (tmp_path / CLOSED_FILE).touch()  # of the process before
    words: list[Sequence[str]] = []
    clock = Clock({5: lambda: add(tmp_path, "late", 3)})
    assert serve_requests(tmp_path, words.append, 10, clock, clock.sleep) == 3
    assert words == [["--prompt=b"], ["--prompt=a"], ["--prompt=late"]]
    assert [state(path)["state"] for path in (first, second)] == ["done", "done"]
    assert clock.now == 5 + 11  # idle from the last one on
    assert (tmp_path / CLOSED_FILE).exists()


def test_a_request_that_fails_does_not_fail_the_others(tmp_path: Path) -> None:
    folders = [add(tmp_path, name, at) for at, name in enumerate("abc")]

    def generate(words: Sequence[str]) -> None:
        if words == ["--prompt=a"]:
            raise DataError("the image is damaged")
        if words == ["--prompt=b"]:
            raise click.UsageError("no such option")

    clock = Clock()
    assert serve_requests(tmp_path, generate, 1, clock, clock.sleep) == 3
    assert [state(path) for path in folders] == [
        {"state": "failed", "message": "the image is damaged"},
        {"state": "failed", "message": "no such option"},
        {"state": "done", "message": ""},
    ]


def test_an_unexpected_error_ends_the_process(tmp_path: Path) -> None:
    path = add(tmp_path, "a", 1)

    def generate(words: Sequence[str]) -> None:
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError):
        serve_requests(tmp_path, generate)
    assert state(path)["state"] == "running"
    assert list(pending_requests(tmp_path)) == []  # the next process does not try it again


def test_a_waiting_job_ends_the_idle_time_only(tmp_path: Path) -> None:
    add(tmp_path, "a", 1)
    clock = Clock({2: (tmp_path / STOP_FILE).touch, 3: lambda: pytest.fail("it waits")})
    stopped: list[str] = []

    def generate(words: Sequence[str]) -> None:
        (tmp_path / STOP_FILE).touch()
        if not stopped:
            add(tmp_path, "b", 2)
        stopped.append(words[0])

    assert serve_requests(tmp_path, generate, 100, clock, clock.sleep) == 2
    assert stopped == ["--prompt=a", "--prompt=b"]


def test_a_deleted_request_gets_no_state(tmp_path: Path) -> None:
    path = add(tmp_path, "a", 1)

    def generate(words: Sequence[str]) -> None:
        path.rename(tmp_path.parent / "trash")

    clock = Clock()
    serve_requests(tmp_path, generate, 1, clock, clock.sleep)
    assert not path.exists()


def test_one_network_is_kept_and_dropped_for_others() -> None:
    kept, loaded = KeptNetwork(), []

    def load(name: str) -> Callable[[], str]:
        return lambda: loaded.append(name) or name  # type: ignore[func-returns-value]

    assert kept.transformer(("a",), load("one")) == "one"  # type: ignore[arg-type]
    assert kept.transformer(("a",), load("two")) == "one"  # type: ignore[arg-type]
    assert kept.transformer(("b",), load("three")) == "three"  # type: ignore[arg-type]
    assert loaded == ["one", "three"]
    tries: list[int] = []

    def work() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "done"

    assert kept.make_room_for(work) == "done"
    kept.transformer(("b",), load("four"))  # type: ignore[arg-type]
    assert loaded[-1] == "four"
    with pytest.raises(RuntimeError, match="other"):
        kept.make_room_for(lambda: (_ for _ in ()).throw(RuntimeError("other")))


def test_texts_are_encoded_once_for_a_model() -> None:
    kept, encoded = KeptNetwork(), []

    def encode(texts: Sequence[str]) -> list[str]:
        encoded.append(list(texts))
        return [text.upper() for text in texts]

    model, other = ModelOptions(), ModelOptions(model_flavour="hd")
    assert kept.embeddings(model, ["a", "b"], encode) == {"a": "A", "b": "B"}  # type: ignore[arg-type]
    kept.embeddings(model, ["b", "c"], encode)  # type: ignore[arg-type]
    kept.embeddings(other, ["b"], encode)  # type: ignore[arg-type]
    assert encoded == [["a", "b"], ["c"], ["b"]]
