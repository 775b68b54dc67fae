"""The definition of a check: a function that is imported late, its expected duration, its outcome.

Standard library only, so that the catalog can be listed without torch, and a module that cannot be
imported fails its own checks and no others.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.workload import Workload

SLACK_S = 30.0  # added to three times the expected duration before a check counts as hanging


@dataclass(frozen=True)
class Outcome:
    """The figures that a check measured, and one sentence for each expectation that it missed."""

    figures: dict[str, Any]
    failures: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Check:
    """A function of this package that runs at its turn and fills one line of the results.

    target: "module.function" within benchmarks.gpu, called with the workload and `arguments`.
    expected_s: duration expected on an H200; with less time left the check is skipped.
    required_packages: without one of them the check is skipped.
    background: the check needs no GPU and runs in a process of its own, at the same time.
    skip_in_rehearsal: another check runs the same code with other sizes.
    """

    name: str
    group: str
    target: str
    expected_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    required_packages: tuple[str, ...] = ()
    background: bool = False
    skip_in_rehearsal: bool = False

    @property
    def limit_s(self) -> float:
        """Seconds after which the process that runs the check is killed."""
        return 3 * self.expected_s + SLACK_S

    def run(self, workload: Workload) -> Outcome:
        """Import the target and call it."""
        module_name, function_name = self.target.split(".")
        module = importlib.import_module(f"benchmarks.gpu.{module_name}")
        function: Callable[..., Outcome] = vars(module)[function_name]
        return function(workload, **self.arguments)

    def missing_packages(self) -> list[str]:
        """Return the required packages that are not installed; nothing is imported."""
        return [name for name in self.required_packages if importlib.util.find_spec(name) is None]
