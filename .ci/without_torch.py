"""Print what the package and its tests require, without torch and all that needs torch.

It is run by the Python whose environment is to be filled, after `pip install --no-deps --editable
.`.
"""

from __future__ import annotations

import re
from importlib import metadata

NEED_TORCH = {
    "deepspeed",
    "diffusers",
    "peft",
    "prodigyopt",
    "schedulefree",
    "torch-optimi",
    "transformers",
}
BROWSER = {"playwright"}  # for tests/e2e/web, which train
TEST = re.compile(r"""\s*extra == ["']test["']$""")


def requirements() -> list[str]:
    """Return the requirements of the package and of its extra `test`, as pip reads them."""
    found = []
    left_out: set[str] = set()
    for line in metadata.requires("simpletuner") or []:
        requirement, _, marker = line.partition(";")
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        if name in NEED_TORCH | BROWSER:
            left_out.add(name)
        elif "extra ==" not in marker:
            found.append(line)
        elif TEST.match(marker):
            found.append(requirement)
    if unknown := (NEED_TORCH | BROWSER) - left_out:
        raise SystemExit(f"pyproject.toml no longer requires {', '.join(sorted(unknown))}")
    return found


if __name__ == "__main__":
    print("\n".join(requirements()))
