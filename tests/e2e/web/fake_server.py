"""The real application with trainings that only pretend: python -m tests.e2e.web.fake_server ...

Run with `--config`, it is such a training: tests/server/fake_trainer.py, which behaves as fake.json
of the workspace says.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import click

from simpletuner.cli.server import bind_socket, run_server
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace

FAKE_TRAINER_PATH = Path(__file__).parents[2] / "server" / "fake_trainer.py"


@click.command()
@click.option("--workspace", type=click.Path(path_type=Path), required=True)
@click.option("--port", type=int, required=True)
def main(workspace: Path, port: int) -> None:
    with bind_socket("127.0.0.1", port) as listening:
        trainer = (sys.executable, "-m", "tests.e2e.web.fake_server")
        run_server(
            ServerSettings(Workspace(workspace), port=port, train_command=trainer),
            listening,
            opens=False,
        )


if __name__ == "__main__":
    if "--config" in sys.argv:
        settings = Path("fake.json")
        if settings.exists():
            os.environ.update(json.loads(settings.read_text()))
        runpy.run_path(str(FAKE_TRAINER_PATH), run_name="__main__")
    else:
        main()
