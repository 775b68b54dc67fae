"""Early stopping: end a run whose held-out loss no longer improves, and export its best step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from simpletuner.events.event_types import Emit, NoticeIssued, WarningIssued
from simpletuner.validation.held_out_loss import HeldOutEvaluator

StepCallback = Callable[[int], None]


@dataclass
class EarlyStopping:
    """Decides after each measurement whether the run ends.

    Every process has the same losses, so all decide the same. Nothing is saved: a resumed run
    decides from the measurements of its checkpoint. save_checkpoint: of the present step.
    load_weights: of the checkpoint of a step; returns whether there is one.
    """

    evaluator: HeldOutEvaluator
    patience: int
    total_steps: int
    save_checkpoint: StepCallback
    load_weights: Callable[[int], bool]
    emit: Emit
    _ended_at: int | None = field(default=None, init=False)
    _exported_step: int | None = field(default=None, init=False)

    def check(self, step: int) -> None:
        """Save the best step, and end the run when the patience is used up."""
        trajectory = self.evaluator.trajectory
        if not trajectory.steps or trajectory.steps[-1] != step or step == 0:
            return
        if self.evaluator.best_step == step:
            self.save_checkpoint(step)
        if trajectory.stale_measurements >= self.patience and self._ended_at != step:
            self._ended_at = step
            if step < self.total_steps:
                self.emit(
                    NoticeIssued(
                        f"early_stopping: the held-out loss has not improved since step "
                        f"{trajectory.reference_step}; the run ends at step {step} of "
                        f"{self.total_steps}"
                    )
                )

    def ends_after(self, step: int) -> bool:
        """Return whether the run ends with this step."""
        return self._ended_at == step

    def use_best_weights(self, step: int) -> None:
        """Load the weights of the best step, for the export that follows."""
        best = self.evaluator.best_step
        self._exported_step = step
        if best is None or best in (0, step):
            return
        if self.load_weights(best):
            self._exported_step = best
            self.emit(NoticeIssued(f"the weights of step {best}, the best one, are exported"))
        else:
            self.emit(
                WarningIssued(
                    f"checkpoint-{best}, the best one, is missing; the weights of step {step} are "
                    "exported"
                )
            )

    def exporting(self, export: StepCallback) -> StepCallback:
        """Return an export that states the step whose weights are loaded."""
        return lambda step: export(step if self._exported_step is None else self._exported_step)
