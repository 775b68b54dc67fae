"""Resolve the accelerator extras and write constraints/cuda13.txt, cuda.txt and cpu.txt.

    python constraints/resolve.py PYTHON3.10 PYTHON3.11 PYTHON3.12 PYTHON3.13

The arguments are interpreters in ascending order of version. pip (23.2 or newer, of the Python
that runs this) reads the packages' metadata from the index, for each interpreter on this platform,
and installs nothing. A package whose version differs between Pythons gets one line per version,
with a marker.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
# torch 2.13 is the version that the tests run on; its wheel for Linux is made for CUDA 13.0.
PINS = {"cuda": "torch==2.10.0", "cuda13": "torch==2.13.0"}
CUDA = re.compile(r"nvidia-|cuda-|triton$")
HEADS = {
    "cuda": """\
# The set of '.[cuda]': CUDA 12.8, torch 2.10.  pip install -c constraints/cuda.txt '.[cuda]'
""",
    "cuda13": """\
# The set of '.[cuda13]': CUDA 13.0, torch 2.13.  pip install -c constraints/cuda13.txt '.[cuda13]'
""",
    "cpu": """\
# The set of '.[cpu]': torch 2.13.  pip install -c constraints/cpu.txt '.[cpu]'
# The set is that of constraints/cuda13.txt without CUDA's own packages. On Linux the public index
# has torch 2.13.0 for CUDA 13 alone, which runs without a GPU; the smaller 2.13.0+cpu fits too.
""",
}
ORIGIN = """\
# Written by constraints/resolve.py: pip resolved it from the index's metadata, on Linux x86-64,
# under Python {pythons}.
"""
INSTALLED = "# Installed:"
NOT_INSTALLED = f"{INSTALLED} not yet, the resolution alone was made.\n"


def resolve(interpreter: str, extra: str) -> dict[str, str]:
    """Return the version, without its local part, of each package that `.[extra]` brings."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *(sys.executable, "-m", "pip", "--python", interpreter, "install", "-qq"),
            *("--dry-run", "--ignore-installed", "--only-binary=:all:", "--report", str(report)),
            *(f"{FOLDER.parent}[{extra}]", PINS[extra]),
        ]
        subprocess.run(command, check=True, env={**os.environ, "SIMPLETUNER_SKIP_UI": "1"})
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    packages = [each["metadata"] for each in found]
    versions = {
        re.sub(r"[-_.]+", "-", each["name"]).lower(): each["version"].split("+")[0]
        for each in packages
    }
    del versions["simpletuner"]
    return versions


def marker(pythons: list[str], first: int, last: int) -> str:
    """Return the marker of the Pythons from `first` to `last`; both ends of all are open."""
    parts = [f'python_version >= "{pythons[first]}"'] if first else []
    if last < len(pythons) - 1:
        parts.append(f'python_version < "{pythons[last + 1]}"')
    return "; " + " and ".join(parts) if parts else ""


def lines(sets: dict[str, dict[str, str]]) -> list[str]:
    """Return a sorted line per package and version. sets: Python -> package -> version."""
    found = []
    for name in sorted(set().union(*sets.values())):
        pythons = [python for python in sets if name in sets[python]]
        if len({sets[python][name] for python in pythons}) == 1:
            found.append(f"{name}=={sets[pythons[0]][name]}")
            continue
        start = 0
        for at, python in enumerate(pythons):
            version = sets[python][name]
            if at + 1 == len(pythons) or sets[pythons[at + 1]][name] != version:
                found.append(f"{name}=={version}{marker(pythons, start, at)}")
                start = at + 1
    return found


def write(extra: str, pythons: list[str], constraints: list[str]) -> None:
    """Write the file of one extra. Its note of an installation stays if the set is the same."""
    path = FOLDER / f"{extra}.txt"
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    installed = ""
    if [line for line in before if not line.startswith("#")] == constraints:
        installed = "".join(f"{line}\n" for line in before if line.startswith(INSTALLED))
    head = HEADS[extra] + ORIGIN.format(pythons=", ".join(pythons)) + (installed or NOT_INSTALLED)
    path.write_text(head + "\n".join(constraints) + "\n", encoding="utf-8")


def version_of(interpreter: str) -> str:
    """Return the major and minor version of a Python, such as "3.12"."""
    command = [interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Resolve every extra under every interpreter of the command line."""
    interpreters = {version_of(interpreter): interpreter for interpreter in sys.argv[1:]}
    for extra in PINS:
        sets = {python: resolve(interpreter, extra) for python, interpreter in interpreters.items()}
        write(extra, [*sets], lines(sets))
    without = [
        {name: version for name, version in each.items() if not CUDA.match(name)}
        for each in sets.values()
    ]
    write("cpu", [*sets], lines(dict(zip(sets, without, strict=True))))


if __name__ == "__main__":
    main()
