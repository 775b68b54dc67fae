"""The campaign of faults: python -m tests.faults [--seed N] [--share 0.1] [NAME ...].

It prints, by campaign, how many were tried, how many had a clean end, and how many ended in a
traceback, a hang, a wrong exit code or a loss. The exit code is 1 unless the last four are 0.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from tests.faults.attacks import attacks
from tests.faults.flips import flips
from tests.faults.images import damaged_images
from tests.faults.inputs import bad_inputs
from tests.faults.openapi import openapi_requests
from tests.faults.outcomes import Tally, report
from tests.faults.writes import failing_disks, kills

MAX_BOUNDARIES = 200  # no writer has as many
COUNTS = {"inputs": 1200, "images": 2400, "flips": 5200, "attacks": 900, "openapi": 3000}


def run_campaign(
    seed: int, share: float, names: tuple[str, ...], root: Path, workspace: Path
) -> list[Tally]:
    """Run the named campaigns, or all. share: part of the full counts."""

    def seeded(name: str) -> random.Random:
        return random.Random(f"{seed} {name}")

    def count(name: str) -> int:
        return max(1, round(COUNTS[name] * share))

    limit = MAX_BOUNDARIES if share >= 0.2 else 3
    os.chdir(workspace)  # relative paths of bad configurations end here
    campaigns: dict[str, Callable[[], Tally]] = {
        "inputs": lambda: bad_inputs(seeded("inputs"), workspace, count("inputs")),
        "images": lambda: damaged_images(seeded("images"), root / "images", count("images")),
        "kills": lambda: kills(root, limit),
        "disks": lambda: failing_disks(root, limit),
        "flips": lambda: flips(seeded("flips"), root / "flips", count("flips")),
        "attacks": lambda: attacks(seeded("attacks"), root / "attacks", count("attacks")),
        "openapi": lambda: openapi_requests(seeded("openapi"), root / "openapi", count("openapi")),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it then rejects
        return [campaigns[name]() for name in names or campaigns]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument(
        "names", nargs="*", help="inputs, images, kills, disks, flips, attacks, openapi"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="part of the full counts")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder) / "workspace"
        workspace.mkdir()
        tallies = run_campaign(given.seed, given.share, tuple(given.names), Path(folder), workspace)
        failures = report(tallies)
        os.chdir("/")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
