"""Search for the configuration file of a run, the same for every command."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from simpletuner.config.paths import display_path
from simpletuner.errors import ConfigError

CONFIG_FILE_NAMES = ("config.json", "config.jsonc", "config.toml", "config.env")
DEFAULT_ENVIRONMENT = "default"  # SimpleTuner's name for the configuration in config/ itself
# Values of config_backend -> the files that are looked for; "cmd" reads no file.
BACKEND_FILE_NAMES: Mapping[str, tuple[str, ...]] = {
    "json": ("config.json", "config.jsonc"),
    "toml": ("config.toml",),
    "env": ("config.env",),
    "cmd": (),
}
EXAMPLES_DIR = Path(__file__).resolve().parent.parent / "examples"


def find_config(
    config: str | Path | None,
    env: str | None,
    example: str | None,
    cwd: Path,
    backend: str | None = None,
) -> Path | None:
    """Return the file that --config, --env or --example names, else the first found.

    Without a name, CONFIG_FILE_NAMES are tried in the working directory and in config/; None if
    there is none. backend: json, toml or env, if only such files count; with cmd none does. Raises
    ConfigError for a name that leads nowhere.
    """
    named = [
        text
        for text, value in (("--config", config), ("--env", env), ("--example", example))
        if value
    ]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} each name a configuration; give one of them")
    names: Sequence[str] = CONFIG_FILE_NAMES
    if backend:
        if backend not in BACKEND_FILE_NAMES:
            allowed = ", ".join(BACKEND_FILE_NAMES)
            raise ConfigError(f"config_backend = {backend!r}: allowed: {allowed}")
        names = BACKEND_FILE_NAMES[backend]
        if not names:
            return None
    if config:
        path = cwd / os.path.expanduser(config)
        return _first_existing(
            f"--config {config}",
            candidate_paths(path, names) if os.path.isdir(path) else [path],
            cwd,
        )
    if env:
        places = candidate_paths(cwd / "config" / env, names)
        if env == DEFAULT_ENVIRONMENT:
            places += candidate_paths(cwd / "config", names)
        return _first_existing(f"--env {env}", places, cwd)
    if example:
        return _first_existing(
            f"--example {example}", candidate_paths(example_folder(example)), cwd
        )
    return next(
        (
            path
            for path in (*candidate_paths(cwd, names), *candidate_paths(cwd / "config", names))
            if os.path.isfile(path)
        ),
        None,
    )


def no_config_message(cwd: Path) -> str:
    """Return the message for a run without any configuration."""
    looked = ", ".join([*CONFIG_FILE_NAMES, *(f"config/{name}" for name in CONFIG_FILE_NAMES)])
    return (
        f"no configuration: none of {looked} is in {cwd}. Write one with `simpletuner "
        "configure`, name one with --config or --env, or try `simpletuner train --example "
        "chroma-nano.peft-lora`"
    )


def example_names() -> list[str]:
    """Return the names of the packaged examples."""
    return sorted(path.parent.name for path in EXAMPLES_DIR.glob("*/config.json"))


def example_folder(name: str) -> Path:
    """Return the folder of a packaged example.

    Raises ConfigError with the list for any other name.
    """
    if name not in example_names():
        raise ConfigError(
            f"there is no example {name!r}; there are: {', '.join(example_names()) or 'none'}"
        )
    return EXAMPLES_DIR / name


def candidate_paths(folder: Path, names: Sequence[str] = CONFIG_FILE_NAMES) -> list[Path]:
    """Return every path that is tried in a folder."""
    return [folder / name for name in names]


def _first_existing(label: str, candidates: Sequence[Path], cwd: Path) -> Path:
    for path in candidates:
        if os.path.isfile(path):
            return path
    looked = ", ".join(display_path(path, cwd) for path in candidates)
    raise ConfigError(f"{label}: not found; looked for {looked}")
