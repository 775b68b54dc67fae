"""The command `simpletuner` from a process that has imported its libraries once.

`warm_path` makes a folder with an executable `simpletuner` for PATH. It sends its arguments, folder,
environment and open files to a server, which forks a process that runs the console script's
function with them. A guide with ten commands then imports torch, diffusers and transformers once.
That the installed console script starts by itself is what the tests of the command line show.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PRELOADED = (
    "simpletuner.cli.train",
    "simpletuner.cli.generate",
    "simpletuner.cli.plan",
    "simpletuner.cli.export",
    "simpletuner.training.run",
    "simpletuner.models.chroma.family",
    "simpletuner.models.chroma.vae",
    "simpletuner.models.chroma.t5",
    "simpletuner.validation.evaluation_model",
    "transformers.models.clip.modeling_clip",
)
OPEN_FILES = 3
CLIENT = """#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(request)
sys.exit(int(connection.makefile().read() or 70))
"""


@contextmanager
def warm_path(folder: Path) -> Iterator[Path]:
    """Yield the folder with the executable; the server runs until the end of the block."""
    folder.mkdir(parents=True)
    address = folder / "socket"
    client = folder / "simpletuner"
    client.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()
    words = [sys.executable, "-m", __name__, str(listener.fileno())]
    with (
        listener,
        subprocess.Popen(
            words, pass_fds=[listener.fileno()], cwd=Path(__file__).parents[2]
        ) as server,
    ):
        try:
            yield folder
        finally:
            server.terminate()


def serve(listener: socket.socket) -> None:
    """Fork a process for each connection, and return in it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            break
        connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listener.close()
    length, files, _, _ = socket.recv_fds(connection, 8, OPEN_FILES)
    request = connection.makefile("rb").read(*struct.unpack(">Q", length))
    command = os.fork()
    if command != 0:
        wait_for(command, connection)
    connection.close()
    arguments, cwd, environ = json.loads(request)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = ["simpletuner", *arguments]


def wait_for(command: int, connection: socket.socket) -> None:
    """Send the exit code of the command, or kill it when the client is gone; end this process."""
    ended = os.pidfd_open(command)
    readable, _, _ = select.select([ended, connection], [], [])
    if ended not in readable:
        os.kill(command, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    if ended in readable:
        connection.sendall(str(code % 256).encode())
    os._exit(0)


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
    from simpletuner.cli import main

    main()
