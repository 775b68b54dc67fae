"""simpletuner server: the web UI and the REST API, local or with a token for remote clients."""

from __future__ import annotations

import contextlib
import socket
import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from simpletuner.config.environment import SERVER_TOKEN_VARIABLE, WORKSPACE_VARIABLE
from simpletuner.errors import ConfigError

if TYPE_CHECKING:
    from simpletuner.server.settings import ServerSettings

MIN_TOKEN_CHARS = 16
MAX_CONNECTIONS = 512  # HTTP and WebSocket together; others get 503
MAX_MESSAGE_BYTES = 1 << 16  # from a client over the WebSocket, which sends only what it follows
SHUTDOWN_GRACE_S = 3
FILE_TYPE = click.Path(path_type=Path, dir_okay=False, exists=True, resolve_path=True)
FOLDER_TYPE = click.Path(path_type=Path, file_okay=False, exists=True, resolve_path=True)


@click.command("server")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 is all addresses.",
)
@click.option(
    "--port",
    default=8001,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port; 0 is any free port.",
)
@click.option(
    "--workspace",
    type=FOLDER_TYPE,
    default=".",
    envvar=WORKSPACE_VARIABLE,
    help=f"Workspace folder (default: {WORKSPACE_VARIABLE}, or else the working directory).",
)
@click.option(
    "--root",
    "roots",
    multiple=True,
    type=FOLDER_TYPE,
    help="Another folder that the web UI may use.",
)
@click.option(
    "--token",
    envvar=SERVER_TOKEN_VARIABLE,
    help=(
        "Access token for remote clients; generated automatically if needed. Every user of this "
        "machine sees a command line (ps): rather put it into the variable "
        f"{SERVER_TOKEN_VARIABLE} or the file .simpletuner/token."
    ),
)
@click.option(
    "--allow-host", "names", multiple=True, help="Host name by which a proxy reaches this server."
)
@click.option("--ssl-certfile", type=FILE_TYPE, help="Certificate (PEM): serve HTTPS.")
@click.option("--ssl-keyfile", type=FILE_TYPE, help="Private key (PEM) of --ssl-certfile.")
@click.option(
    "--env",
    "env",
    help="Queue the training of the configuration config/NAME of the workspace at the start.",
)
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
def command(
    host: str,
    port: int,
    workspace: Path,
    roots: tuple[Path, ...],
    token: str | None,
    names: tuple[str, ...],
    ssl_certfile: Path | None,
    ssl_keyfile: Path | None,
    env: str | None,
    opens: bool,
) -> None:
    """Start the web UI at http://localhost:8001.

    Only local connections are accepted; with another --host, or with --allow-host, remote clients
    can connect with a token. Trainings are separate processes and continue when the server ends.
    """
    from simpletuner.server.settings import ServerSettings
    from simpletuner.server.token_auth import read_or_create_secret
    from simpletuner.server.workspace import Workspace

    if token is not None and len(token) < MIN_TOKEN_CHARS:
        raise ConfigError(
            f"the token must have at least {MIN_TOKEN_CHARS} characters; leave it out to "
            "generate one"
        )
    check_certificate(ssl_certfile, ssl_keyfile)
    with bind_socket(host, port) as listening:
        place = Workspace(workspace, roots)
        settings = ServerSettings(
            place,
            host,
            listening.getsockname()[1],
            token,
            names,
            certfile=ssl_certfile,
            keyfile=ssl_keyfile,
        )
        if settings.is_public and token is None:
            settings = replace(settings, token=read_or_create_secret(place.server_dir / "token"))
        run_server(settings, listening, opens, env)


def check_certificate(certfile: Path | None, keyfile: Path | None) -> None:
    """Raise ConfigError unless both files are given and belong together, or none is given."""
    import ssl

    if (certfile is None) != (keyfile is None):
        raise ConfigError("--ssl-certfile and --ssl-keyfile are given together or not at all")
    if certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            certfile, keyfile, password=_refuse_password
        )
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"{certfile}, {keyfile}: not a certificate and its private key, both as PEM and "
            f"without a password ({error})"
        ) from error


def _refuse_password() -> str:
    """Refuse an encrypted key, for which OpenSSL would ask on the terminal."""
    raise ValueError("the key is encrypted")


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to this address. Raises ConfigError if the address is in use."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"{host}:{port}: {reason}; choose another --port, or 0 for any free one"
        ) from error
    return listening


def run_server(
    settings: ServerSettings, listening: socket.socket, opens: bool, env: str | None = None
) -> None:
    """Serve until Ctrl-C or SIGTERM. There is no access log, for privacy.

    env: a configuration of the workspace whose training is queued first.
    """
    import uvicorn

    from simpletuner.server.app import create_app
    from simpletuner.server.http_protocol import ConnectionCounter, make_protocol

    app = create_app(settings)
    if env is not None:
        from simpletuner.server.environment_queue import queue_environment

        click.echo(queue_environment(app.state.services, env))
    launch = "" if app.state.token_auth is None else f"#/login/{app.state.token_auth.login_code}"

    class Announced(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print_address(settings, launch, opens)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws_max_size=MAX_MESSAGE_BYTES,
        limit_concurrency=MAX_CONNECTIONS,
        http=make_protocol(ConnectionCounter()),
        ssl_certfile=settings.certfile,
        ssl_keyfile=settings.keyfile,
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
    )
    with contextlib.suppress(KeyboardInterrupt):
        Announced(config).run([listening])
    click.echo(
        "\nThe server has stopped. Running trainings continue; start the server again to see them."
    )


def print_address(settings: ServerSettings, launch: str, opens: bool) -> None:
    """Print the address when the server answers."""
    name = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname(), "127.0.0.1": "localhost"}
    host = name.get(settings.host, f"[{settings.host}]" if ":" in settings.host else settings.host)
    scheme = "http" if settings.certfile is None else "https"
    url = f"{scheme}://{host}:{settings.port}/{launch}"
    click.echo(f"simpletuner: {url}")
    if launch:
        click.echo("This link logs in once. For scripts and later logins use your token, or the")
        advice = (
            ""
            if settings.certfile
            else (" Plain HTTP: across a network use a tunnel (ssh -L), or --ssl-certfile.")
        )
        click.echo(f"one in {settings.workspace.server_dir / 'token'}.{advice}")
    if opens:
        webbrowser.open(url)
