"""Twenty attacks on a training server, each with the tests that cover it, here or elsewhere."""

from __future__ import annotations

import ast
import json
import os
import pickle
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from simpletuner.server.api_errors import ApiError
from simpletuner.server.app import create_app
from simpletuner.server.config_validation import validate_config
from simpletuner.server.job_config import job_config_from_draft
from simpletuner.server.schemas.configs import Draft, DraftWrite
from simpletuner.server.schemas.jobs import JobRequest
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace
from tests.server.queue_harness import QueueHarness, wait_until

TESTS = Path(__file__).parents[1]
CANARY = "hf_canary0123456789"

# attack -> file below tests/ and the test in it
AGAINST: Mapping[str, tuple[str, ...]] = {
    "1 reached from the network": (
        "server/test_server_command.py::test_only_this_machine_reaches_it",
        "server/test_security_middleware.py::test_no_server_for_others_without_a_token",
    ),
    "2 no token": ("server/test_security_middleware.py::test_every_route_wants_the_token",),
    "3 DNS rebinding": (
        "server/test_security_middleware.py::test_foreign_names_are_not",
        "server/test_security_middleware.py::test_foreign_names_get_no_web_socket",
    ),
    "4 forged requests": (
        "server/test_security_middleware.py::test_foreign_pages_get_nothing",
        "server/test_security_middleware.py::test_only_json_is_taken",
        "server/test_read_only_routes.py::test_reading_changes_nothing_and_tells_no_secret",
    ),
    "5 shared with other origins": (
        "server/test_security_middleware.py::test_headers_of_every_answer",
    ),
    "6 a foreign page's WebSocket": (
        "server/test_security_middleware.py::test_foreign_pages_get_no_web_socket",
        "server/test_server_command.py::test_a_foreign_page_gets_no_web_socket",
    ),
    "7 reading outside": (
        "server/test_read_only_routes.py::test_no_path_leads_outside",
        "server/test_run_artifacts.py::test_no_spelling_leads_out",
        "server/test_static_pages.py::test_nothing_beside_the_pages_is_sent",
    ),
    "8 writing outside": (
        "server/test_uploads.py::test_names_that_lead_away",
        "server/test_uploads.py::test_zip_slip",
        "server/test_jobs_api.py::test_a_link_in_the_place_of_control_is_not_followed",
    ),
    "9 commands in names": (
        "server/test_attacks.py::test_names_are_never_commands_or_flags",
        "test_layers.py::test_no_pickle_and_no_shell",
    ),
    "10 pickles": (
        "server/test_attacks.py::test_a_pickle_among_the_files_is_never_opened",
        "adapters/test_layouts.py::test_pickles_are_never_opened",
        "test_layers.py::test_no_pickle_and_no_shell",
    ),
    "11 safetensors bombs": (
        "adapters/test_layouts.py::test_other_kinds_of_file",
        "adapters/test_layouts.py::test_damage_of_any_kind_is_told_as_such",
        "models/test_weights.py::test_a_file_with_a_tail_is_damaged",
    ),
    "12 requests made by the server": (
        "server/test_attacks.py::test_no_address_is_fetched_for_a_dataset",
    ),
    "13 stored scripts": (
        "server/test_run_artifacts.py::test_what_a_browser_might_run_is_a_download",
        "server/test_security_middleware.py::test_the_policy_allows_no_inline_no_eval_no_frame_no_other_host",
        "e2e/web/test_accessibility.py::test_the_headers_of_the_page",
        "e2e/web/test_dataset_pages.py::test_uploads_that_are_refused_say_why_and_the_rest_comes_in",
    ),
    "14 secrets": (
        "server/test_attacks.py::test_no_secret_lies_in_the_workspace_of_a_job",
        "server/test_read_only_routes.py::test_reading_changes_nothing_and_tells_no_secret",
        "config/test_load.py::test_secrets_stay_out_of_the_run_folder",
    ),
    "15 too much": (
        "server/test_security_middleware.py::test_bodies_have_an_end",
        "server/test_security_middleware.py::test_a_body_that_never_ends_is_not_waited_for",
        "server/test_run_artifacts.py::test_the_log_is_bounded",
        "server/test_uploads.py::test_bombs",
    ),
    "16 guessing the token": (
        "server/test_security_middleware.py::test_guessing_is_made_to_wait",
        "server/test_security_middleware.py::test_tokens_are_compared_in_constant_time",
        "server/test_security_middleware.py::test_the_launch_word_opens_once",
    ),
    "17 frames": ("server/test_security_middleware.py::test_headers_of_every_answer",),
    "18 code from the hub": ("test_layers.py::test_no_pickle_and_no_shell",),
    "19 hooks": ("server/test_config_validation.py::test_what_reaches_outside_is_not_settable",),
    "20 permissions": (
        "server/test_security_middleware.py::test_secrets_are_256_bit_and_for_their_owner_alone",
        "server/test_attacks.py::test_folders_are_as_the_umask_says",
    ),
}


def test_every_attack_has_its_tests() -> None:
    assert [int(name.split()[0]) for name in AGAINST] == list(range(1, 21))
    for named in sorted({one for tests in AGAINST.values() for one in tests}):
        file, _, name = named.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, named


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> QueueHarness:
    monkeypatch.setenv("FAKE_STEPS", "1")
    (tmp_path / "workspace").mkdir()
    return QueueHarness(tmp_path / "workspace")


NAMES = [
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "| touch pwned",
    "a && touch pwned #",
    "a\ntouch pwned",
    "--config=/etc/passwd",
    "-rf",
    "--host=0.0.0.0",
    "%(pwned)s {pwned} ${HOME}",
    "../../pwned",
    "/pwned",
    "~",
]


def test_names_are_never_commands_or_flags(harness: QueueHarness, tmp_path: Path) -> None:
    """The command line of a job contains no text of a user, and the run folder stays inside."""
    jobs = []
    for name in NAMES:
        with suppress(ApiError):
            jobs.append(harness.enqueue(name))
    assert len(jobs) > 5
    for job in jobs:
        work = harness.read_job_file(job, "job.json")
        config = str(harness.jobs.jobs_dir / job.id / "config" / "config.json")
        assert work["argv"][-2:] == ["--config", config]
        assert not any(name in word for name in NAMES for word in work["argv"] if len(name) > 3)
        run_dir = Path(work["run_dir"])
        assert run_dir.parent == harness.workspace.output_dir
        assert not run_dir.name.startswith(("-", "."))
    harness.wait_for_state(jobs[0], "done")
    for path in tmp_path.rglob("*pwned*"):
        assert path.parent == harness.workspace.output_dir, path


@pytest.mark.parametrize("option", ["output_dir", "cache_dir", "pretrained_model_name_or_path"])
def test_values_are_never_flags(harness: QueueHarness, option: str) -> None:
    """What is written into a file is read there: nothing of it reaches a command line."""
    with suppress(ApiError):
        job = harness.jobs.enqueue(
            JobRequest(draft=harness.create_draft("v", **{option: "--serve"}))
        )
        assert "--serve" not in harness.read_job_file(job, "job.json")["argv"]


class Trap:
    """Opened as a pickle, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_among_the_files_is_never_opened(harness: QueueHarness, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    data = pickle.dumps(Trap(sprung))
    job = harness.enqueue("pickled")
    run_dir = Path(harness.read_job_file(job, "job.json")["run_dir"])
    harness.wait_for_state(job, "done")
    checkpoint = next(run_dir.glob("checkpoint-*"))
    for path in (
        run_dir / "pytorch_lora_weights.bin",
        checkpoint / "optimizer.pt",
        checkpoint / "state.json",
        run_dir / "events.jsonl",
        run_dir / "images" / "a.png",
        harness.workspace.datasets_dir / "photos" / "b.png",
        harness.jobs.jobs_dir / job.id / "end.json",
        harness.workspace.server_dir / "queue.json",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    again = harness.restart()
    for id in (job.run, *(one.id for one in again.runs.summaries())):
        again.runs.detail(id)
        again.runs.list_images(id)
    again.jobs.get_queue()
    again.supervisor.run_once()
    assert not sprung.exists()
    pickle.loads(data)
    assert sprung.exists(), "the trap itself works"


@pytest.mark.parametrize(
    "dataset",
    [
        {"instance_data_dir": "http://169.254.169.254/latest/meta-data"},
        {"instance_data_dir": "http://127.0.0.1:8001/api/v1/system"},
        {"instance_data_dir": "https://[::1]/a"},
        {"instance_data_dir": "file:///etc"},
        {"type": "csv", "csv_file": "http://127.0.0.1/a.csv", "csv_url_column": "url"},
        {"type": "huggingface", "dataset_name": "http://127.0.0.1/a"},
        {"type": "aws", "aws_endpoint_url": "http://127.0.0.1/", "aws_bucket_name": "a"},
    ],
)
def test_no_address_is_fetched_for_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: dict[str, str]
) -> None:
    """Datasets are folders: an address is refused, and asked of nobody."""

    def connect(*words: object) -> None:
        raise AssertionError(f"a connection to {words}")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    verdict = validate_config(
        Workspace(tmp_path), {"model_flavour": "nano"}, [{"id": "a", "type": "local", **dataset}]
    )
    assert verdict.problems


def test_no_secret_lies_in_the_workspace_of_a_job(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training may need the token; it gets it as the server has it, and no file does."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, CANARY)
    job = harness.enqueue("quiet")
    harness.wait_for_state(job, "done")
    wait_until(
        lambda: (harness.jobs.jobs_dir / job.id / "exit.json").exists(), "the runner has ended"
    )
    held = [path for path in harness.workspace.root.rglob("*") if path.is_file()]
    assert len(held) > 10
    assert [path for path in held if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in harness.jobs.get_queue().model_dump_json()
    asked = harness.create_draft("loud", validation_prompt="{env:HF_TOKEN}")
    with pytest.raises(ApiError):
        harness.jobs.enqueue(JobRequest(draft=asked))


def test_folders_are_as_the_umask_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person who lets nobody in is not overruled by what a server or its training makes."""
    monkeypatch.setenv("FAKE_STEPS", "1")
    before = os.umask(0o077)
    try:
        (tmp_path / "private").mkdir()
        bench = QueueHarness(tmp_path / "private")
        job = bench.enqueue("mine")
        bench.wait_for_state(job, "done")
    finally:
        os.umask(before)
    for path in bench.workspace.root.rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path


def test_a_job_s_folder_is_not_a_draft_s(harness: QueueHarness) -> None:
    """Ids are the server's own: what a client names as one is looked up, never joined to a path."""
    for id in ("../jobs", "..%2f", "/etc/passwd", "$(id)", "a" * 12, "\0", ""):
        with pytest.raises(ApiError):
            harness.jobs.enqueue(JobRequest(draft=id))
        with pytest.raises(ApiError):
            harness.jobs.get_job(id)
        with pytest.raises(ApiError):
            harness.drafts.update(id, DraftWrite(name="a", config={}, datasets=[]))


HALF = "\ud800"
BODIES = [
    ("/api/v1/drafts", {"name": HALF, "config": {}, "datasets": []}),
    ("/api/v1/drafts", {"name": "x", "config": {HALF: 1}, "datasets": []}),
    ("/api/v1/drafts", {"name": "x", "config": {}, "datasets": [{"id": HALF}]}),
    ("/api/v1/drafts", {"name": "x", "config": {}, "datasets": [], HALF: 1}),
    ("/api/v1/import", {"name": HALF, "text": "{}"}),
    ("/api/v1/import", {"name": "x.json", "text": HALF}),
    ("/api/v1/login", {"token": HALF}),
    ("/api/v1/validate", {"config": {HALF: HALF}, "datasets": []}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_half_a_surrogate_is_refused(tmp_path: Path, path: str, body: dict[str, object]) -> None:
    settings = ServerSettings(Workspace(tmp_path), token="t" * 20, host="0.0.0.0")
    client = TestClient(
        create_app(settings), base_url="http://127.0.0.1", raise_server_exceptions=False
    )
    answer = client.post(
        path,
        content=json.dumps(body),
        headers={"content-type": "application/json", "authorization": f"Bearer {'t' * 20}"},
    )
    assert answer.status_code == 422, answer.text
    answer.json()


@pytest.mark.parametrize("name", ["a\u202egpj.exe", "a\x1b[2Jb", "a\u200bb", "a\u2066b"])
def test_what_is_not_shown_is_in_no_name_and_no_message(tmp_path: Path, name: str) -> None:
    client = TestClient(
        create_app(ServerSettings(Workspace(tmp_path))), base_url="http://127.0.0.1"
    )
    refused = client.post("/api/v1/drafts", json={"name": name, "config": {}, "datasets": []})
    assert refused.status_code == 422
    answer = client.post("/api/v1/validate", json={"config": {name: 1}, "datasets": []})
    assert answer.status_code in (200, 422)
    for character in "\u202e\x1b\u2066":
        assert character not in refused.text


@pytest.mark.parametrize(
    ("output_dir", "said"),
    [
        (".", "belongs to the server"),
        ("pictures", "contains the images"),
        ("pictures/run", "is inside"),
        ("mine", "holds files"),
    ],
)
def test_validation_and_the_queue_refuse_the_same_folders(
    tmp_path: Path, output_dir: str, said: str
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    workspace = Workspace(tmp_path)
    datasets = [
        {
            "id": "p",
            "type": "local",
            "instance_data_dir": "pictures",
            "caption_strategy": "filename",
        }
    ]
    config = {"output_dir": output_dir, "max_train_steps": 1}
    problems = validate_config(workspace, config, datasets).problems
    assert any(said in problem.message and problem.loc == "output_dir" for problem in problems)
    draft = Draft(id="0" * 12, name="x", version=1, changed_t=0.0, config=config, datasets=datasets)
    with pytest.raises(ApiError, match=said):
        job_config_from_draft(draft, workspace)
