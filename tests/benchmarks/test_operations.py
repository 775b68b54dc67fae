"""The counts that results/operations.md publishes, as bounds."""

from __future__ import annotations

from benchmarks import operations


def test_a_step_of_all_linears_takes_few_operations() -> None:
    """diffusers and PEFT take 14,811 for the same modules, counted in the same way."""
    counted = operations.count_own_step(operations.deep_workload(), {})
    assert counted["operations"] <= 9_000


def test_an_optimizer_step_in_8_bits_takes_few_operations() -> None:
    assert operations.count_optimizer("adamw_8bit")["operations"] < 1_000
