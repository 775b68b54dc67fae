"""Expectations of a check: tensors bit-equal or within a tolerance; differences are recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from benchmarks.gpu.checks import Outcome
from torch import Tensor

Tensors = Mapping[str, Tensor]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| in the Euclidean norm, in float64 on the CPU.

    NaN anywhere gives infinity.
    """
    actual, expected = (tensor.detach().cpu().double() for tensor in (actual, expected))
    norm = float(torch.linalg.vector_norm(expected))
    error = float(torch.linalg.vector_norm(actual - expected))
    if math.isnan(error):
        return math.inf
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return error / norm


def have_same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Compare shapes, dtypes and bytes: NaN equals the same NaN, and 0.0 differs from -0.0."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    first, second = (
        tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        for tensor in (actual, expected)
    )
    return torch.equal(first, second)


class Comparison:
    """Collects the figures of a check and the expectations that it missed."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self.failures: list[str] = []

    def record(self, **figures: Any) -> None:
        self.figures |= figures

    def expect(self, condition: bool, failure: str) -> None:
        """Record the sentence `failure` unless the condition holds."""
        if not condition:
            self.failures.append(failure)

    def expect_finite(self, label: str, tensor: Tensor) -> None:
        self.expect(bool(torch.isfinite(tensor).all()), f"{label}: not finite")

    def expect_close(
        self, label: str, actual: Tensors, expected: Tensors, tolerance: float
    ) -> None:
        """Expect the largest relative error of several tensors to be within the tolerance."""
        self._expect_same_names(label, actual, expected)
        errors = {
            name: relative_error(actual[name], expected[name])
            for name in actual.keys() & expected.keys()
        }
        worst = max(errors, key=lambda name: errors[name], default="")
        error = errors.get(worst, math.inf)
        self.figures[label] = {"error": error, "tolerance": tolerance, "worst": worst}
        place = f" in {worst}" if worst else ""
        self.expect(
            error <= tolerance,
            f"{label}: relative error {error:.2e}{place}, tolerance {tolerance:.0e}",
        )

    def expect_bit_equal(self, label: str, actual: Tensors, expected: Tensors) -> None:
        """Expect every byte of several tensors to be equal; record the error of different ones."""
        self._expect_same_names(label, actual, expected)
        names = sorted(actual.keys() & expected.keys())
        different = [name for name in names if not have_same_bits(actual[name], expected[name])]
        errors = [relative_error(actual[name], expected[name]) for name in different]
        largest = max(errors, default=0.0)
        self.figures[label] = {"different": len(different), "of": len(names), "error": largest}
        self.expect(bool(names), f"{label}: no tensor to compare")
        self.expect(
            not different,
            f"{label}: {len(different)} of {len(names)} tensors differ,"
            f" relative error up to {largest:.2e}",
        )

    def outcome(self) -> Outcome:
        return Outcome(self.figures, tuple(self.failures))

    def _expect_same_names(self, label: str, actual: Tensors, expected: Tensors) -> None:
        only_one = sorted(actual.keys() ^ expected.keys())
        self.expect(not only_one, f"{label}: only on one side: {', '.join(only_one[:3])}")
