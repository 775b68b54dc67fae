"""Every path that a command writes is in the run folder, the cache or where an option says."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from simpletuner.config.output_folder import RUN_MARKER
from simpletuner.training.own_files import OWN_PATTERNS
from tests.e2e import written_paths
from tests.e2e.training_project import TrainingProject
from tests.inside import inside
from tests.server.test_server_command import PATIENCE_S, port_of, served

TINY = {
    "max_train_steps": 2, "validation_disable": False, "validation_prompt": "a red square",
    "validation_resolution": "64", "validation_num_inference_steps": 1, "validation_step_interval": 2,
    "gradient_accumulation_steps": 1,
}  # fmt: skip
NANO = {
    "model_flavour": "nano", "resolution": 64, "max_train_steps": 2, "torch_num_threads": 1,
    "validation_resolution": "64", "validation_num_inference_steps": 1, "validation_prompt": "a square",
}  # fmt: skip
# Patterns of paths below the root, with all that is below them; one that ends with / is the folder alone.
RUN = ("project/run/", *(f"project/run/{name}" for name in (
    RUN_MARKER, "run.lock", "control", ".writing-checkpoint-*", *OWN_PATTERNS)))  # fmt: skip
CACHE = ("cache/", "cache/content.sqlite", "cache/text", "cache/vae")
USER_CACHE = ("home/.cache/", "home/.cache/simpletuner/")
# torch's compiler makes this folder when it is imported, also where nothing is compiled.
COMPILED = (*USER_CACHE, "home/.cache/simpletuner/compiled")
QUANTIZED = (*USER_CACHE, "home/.cache/simpletuner/quantized")
PLANS = (*USER_CACHE, "home/.cache/simpletuner/plan")
# Removed before the command ends, and where the system wants temporary files. The second is the name
# with which the standard library tries whether that folder can be written.
TEMPORARY = ("temporary/simpletuner-*", f"temporary/{'[a-z0-9_]' * 8}")
# The name of a file until it is complete: .NAME.1234.tmp, NAME.tmp, NAME.partial, .NAME.partial
UNTIL_COMPLETE = re.compile(r"\.?(.+?)(?:\.\d+(?:-\d+)?\.tmp|\.tmp|\.partial)")


class WatchedFolder:
    """A home, a folder for temporary files, a project, and an empty folder to run commands in."""

    def __init__(self, root: Path) -> None:
        self.root, self.log = root, root.with_name("written-paths")
        for name in ("home", "temporary", "work"):
            (root / name).mkdir(parents=True)
        self.project = TrainingProject(root / "project", **TINY)
        self.project.load_config()

    def run(self, *words: object) -> set[str]:
        """Run a command in this process; return what `watch` does."""

        def act() -> None:
            done = inside(self.root / "work", *map(str, words))
            assert done.returncode == 0, (words, done.stdout, done.stderr)

        return self.watch(act)

    def watch(self, act: Callable[[], None]) -> set[str]:
        """Return the paths below the root that `act` and its processes have written or removed.

        Fails if they write anything outside of the root or leave an incomplete or temporary file.
        What libraries have written in C or Rust is seen by comparing all files.
        """
        self.log.write_bytes(b"")
        before = self.files()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(written_paths.LOG_VARIABLE, str(self.log))
            act()
        recorded = {self.complete_name(path) for path in written_paths.read_log(self.log)}
        after = self.files()
        changed = {
            name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
        }
        assert [name for name in after if UNTIL_COMPLETE.fullmatch(Path(name).name)] == []
        assert list((self.root / "temporary").iterdir()) == []
        return recorded | changed

    def complete_name(self, path: str) -> str:
        """Return a path below the root by the names that its parts have when they are complete."""
        assert Path(path).is_relative_to(self.root), f"{path} is outside"
        parts = Path(path).relative_to(self.root).parts
        return "/".join(UNTIL_COMPLETE.sub(r"\1", part) for part in parts)

    def files(self) -> dict[str, tuple[int, int]]:
        """Return file -> its size and the time of its last change."""
        return {
            str(path.relative_to(self.root)): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.root.rglob("*")
            if path.is_file()
        }


def is_listed(path: str, pattern: str) -> bool:
    if pattern.endswith("/"):
        return path == pattern[:-1]
    parts = path.split("/")[: pattern.count("/") + 1]
    return fnmatch("/".join(parts), pattern)


def assert_listed(paths: set[str], listed: tuple[str, ...]) -> None:
    assert {path for path in paths if not any(is_listed(path, each) for each in listed)} == set()


def set_home(root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HOME", str(root / "home"))
    for name in ("XDG_CACHE_HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        patch.delenv(name, raising=False)
    patch.setenv("TMPDIR", str(root / "temporary"))


def test_every_path_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, because each command needs what the ones before it have written."""
    watched = WatchedFolder(tmp_path / "root")
    written_paths.install()
    root = watched.root
    set_home(root, monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(root / "temporary"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    config = ("--config", root / "project" / "config.json")
    run = root / "project" / "run"
    lora = run / "pytorch_lora_weights.safetensors"
    commands = {
        ("train", *config, "--cache_dir", root / "cache"): (*RUN, *CACHE),
        ("generate", *config, "--prompt", "a", "--lora", run, "--size", "64", "--steps", "1", "--out",
         root / "out"): ("out",),
        ("export", lora, "--format", "comfyui", "--output", root / "exported.safetensors"):
            ("exported.safetensors",),
        ("export", lora, "--check"): (),
        ("merge", "--lora", lora, "--base", root / "project" / "base", "--output", root / "merged"):
            ("merged",),
        ("quantize", *config, "--base_model_precision", "int8"): QUANTIZED,
        ("report", run): ("project/run/report.html",),
        ("inspect", *config): TEMPORARY,
        ("plan", *config): PLANS,
        ("configure", "--defaults", "--set", f"instance_data_dir={root}/project/pictures", "--output",
         root / "made"): ("made/", "made/config.json", "made/multidatabackend.json"),
        ("examples", "copy", "chroma.peft-lora", "--dest", root / "example"): ("example",),
        ("options", "lora_rank"): (),
    }  # fmt: skip
    for words, listed in commands.items():
        paths = watched.run(*words)
        assert_listed(paths, listed)
        assert bool(paths) == bool(listed), words[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "listed"),
    [
        (
            ("tune", "--rates", "1e-3,1e-2", "--max_train_steps", "40"),
            (*RUN, "project/run/cache", "project/run-tune", *COMPILED),
        ),
        (
            ("train", "--num_processes", "2", "--output_dir", "../project/run"),
            (*RUN, "project/run/cache", *COMPILED, *TEMPORARY),
        ),
    ],
    ids=("tune", "several processes"),
)
def test_processes_of_a_command_write_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], listed: tuple[str, ...]
) -> None:
    watched = WatchedFolder(tmp_path / "root")
    monkeypatch.setenv("PYTHONPATH", written_paths.children_path(tmp_path / "site"))
    set_home(watched.root, monkeypatch)
    config = watched.root / "project" / "config.json"
    command = [sys.executable, "-m", "simpletuner", *words, "--config", str(config)]

    def act() -> None:
        subprocess.run(command, cwd=watched.root / "work", check=True, capture_output=True)

    assert_listed(watched.watch(act), listed)


@pytest.mark.slow
def test_a_server_and_its_jobs_write_into_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = WatchedFolder(tmp_path / "root")
    workspace = watched.root / "workspace"
    (workspace / "datasets").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", written_paths.children_path(tmp_path / "site"))
    set_home(watched.root, monkeypatch)
    paths = watched.watch(partial(use_server, workspace, watched.root / "project" / "pictures"))
    assert_listed(paths, ("workspace", *COMPILED, *PLANS, *TEMPORARY))
    written = {"/".join(path.split("/")[:2]) for path in paths}
    assert {"workspace/datasets", "workspace/.simpletuner", "workspace/output"} <= written


def use_server(workspace: Path, pictures: Path) -> None:
    """Upload a dataset, train, generate, and delete the dataset."""
    with (
        served(workspace) as (process, line),
        httpx.Client(
            base_url=f"http://127.0.0.1:{port_of(line)}/api/v1/", timeout=PATIENCE_S
        ) as client,
    ):

        def ask(method: str, path: str, **body: Any) -> Any:
            answer = client.request(method, path, **body)
            assert answer.is_success, answer.text
            return answer.json() if answer.content else None

        def finish(job: dict[str, Any]) -> None:
            deadline = time.monotonic() + PATIENCE_S
            while (state := ask("GET", f"jobs/{job['id']}"))["state"] != "done":
                assert state["ended_t"] is None, state
                assert time.monotonic() < deadline, state
                time.sleep(0.2)

        ask("POST", "datasets", json={"name": "photos"})
        for file in pictures.iterdir():
            headers = {"content-type": "application/octet-stream"}
            path = f"datasets/photos/files/{file.name}"
            ask("PUT", path, content=file.read_bytes(), headers=headers)
        config = {"model_family": "chroma", "model_type": "lora", "lora_rank": 2, **NANO}
        dataset = {"id": "photos", "type": "local", "instance_data_dir": "datasets/photos",
                   "caption_strategy": "textfile", "resolution": 64}  # fmt: skip
        draft = ask("POST", "drafts", json={"name": "d", "config": config, "datasets": [dataset]})
        ask("POST", "plan", json={"config": config, "datasets": [dataset]})
        finish(ask("POST", "jobs", json={"draft": draft["id"]}))
        request = {"prompts": ["a"], "flavour": "nano", "steps": 1, "size": "64"}
        ask("POST", "generations", json=request)
        finish(next(job for job in ask("GET", "queue")["jobs"] if job["kind"] == "generate"))
        ask("DELETE", "datasets/photos")
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE_S)
