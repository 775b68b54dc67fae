"""`simpletuner server` over HTTPS, with a configuration queued at the start, and its workspace."""

from __future__ import annotations

import http.client
import json
import shutil
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from simpletuner.cli import server as cli
from simpletuner.errors import ConfigError
from simpletuner.server.environment_queue import queue_environment
from simpletuner.server.services import Services
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace
from tests.server.queue_harness import FAKE_TRAIN_COMMAND


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("NOT TESTED, TLS: openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    words = [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    words += ["-nodes", "-subj", "/CN=localhost", "-days", "2", "-keyout", "key.pem"]
    words += ["-out", "cert.pem", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def test_https_is_served_and_its_cookie_is_secure(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    certfile, keyfile = certificate
    with cli.bind_socket("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        settings = ServerSettings(
            Workspace(tmp_path.resolve()),
            port=port,
            token="a-token-of-a-test-server",
            certfile=certfile,
            keyfile=keyfile,
        )
        thread = threading.Thread(
            target=cli.run_server, args=(settings, listening, False), daemon=True
        )
        thread.start()
        trusted = ssl.create_default_context(cafile=str(certfile))
        deadline = time.monotonic() + 60
        while True:
            connection = http.client.HTTPSConnection("localhost", port, context=trusted)
            try:
                body = json.dumps({"token": "a-token-of-a-test-server"})
                headers = {
                    "content-type": "application/json",
                    "origin": f"https://localhost:{port}",
                }
                connection.request("POST", "/api/v1/login", body, headers)
                answer = connection.getresponse()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            finally:
                connection.close()
    assert answer.status == 204
    assert "Secure" in (answer.headers["set-cookie"] or "")


def test_a_certificate_needs_its_key(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    certfile, keyfile = certificate
    cli.check_certificate(None, None)
    cli.check_certificate(certfile, keyfile)
    for pair in ((certfile, None), (None, keyfile)):
        with pytest.raises(ConfigError, match="together"):
            cli.check_certificate(*pair)
    other = tmp_path / "other.pem"
    other.write_text("nothing")
    for wrong in ((other, keyfile), (certfile, other), (keyfile, certfile)):
        with pytest.raises(ConfigError, match="not a certificate and its private key"):
            cli.check_certificate(*wrong)


def write_environment(root: Path, name: str, **options: object) -> None:
    folder = root / "config" / name
    folder.mkdir(parents=True)
    photos = root / "datasets" / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(photos / "a.png")
    (photos / "a.txt").write_text("a")
    (folder / "config.json").write_text(json.dumps({"model_flavour": "nano", **options}))
    sets = [{"id": "photos", "type": "local", "instance_data_dir": "../../datasets/photos"}]
    (folder / "multidatabackend.json").write_text(json.dumps(sets))


def test_a_configuration_is_queued_at_the_start(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    write_environment(root, "fox", output_dir="output/fox")
    write_environment(root, "bad", lora_rank=0)
    services = Services.from_settings(
        ServerSettings(Workspace(root), train_command=FAKE_TRAIN_COMMAND)
    )
    assert queue_environment(services, "fox") == f"--env fox: queued as {root / 'output' / 'fox'}"
    assert "lora_rank" in queue_environment(services, "bad")
    assert "was not queued" in queue_environment(services, "fox")  # it has a job already
    assert [job.name for job in services.jobs.get_queue().jobs] == ["fox"]
    for wrong in ("none", "..", "../config/fox", ""):
        with pytest.raises(ConfigError, match="--env"):
            queue_environment(services, wrong)


def test_the_workspace_can_be_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setenv("SIMPLETUNER_WORKSPACE", str(tmp_path))
    monkeypatch.setattr(
        cli, "run_server", lambda settings, *_: seen.append(settings.workspace.root)
    )
    assert CliRunner().invoke(cli.command, ["--port", "0"]).exit_code == 0
    other = tmp_path / "other"
    other.mkdir()
    CliRunner().invoke(cli.command, ["--port", "0", "--workspace", str(other)])
    assert seen == [tmp_path.resolve(), other.resolve()]
