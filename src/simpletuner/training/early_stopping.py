"""Early stopping: end a run whose held-out loss no longer improves, and export its best step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from simpletuner.config.schema import OptimizerOptions
from simpletuner.events.event_types import Emit, NoticeIssued, WarningIssued
from simpletuner.training.optimizers import learning_rate
from simpletuner.validation.held_out_loss import HeldOutEvaluator

StepCallback = Callable[[int], None]
LOW_RATE = 0.1  # of the way from lr_end to learning_rate: below it a schedule has come down


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
    optimizer_options: OptimizerOptions
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
                remark = describe_high_rate(self.optimizer_options, step, self.total_steps)
                if remark is not None:
                    self.emit(NoticeIssued(f"early_stopping: {remark}"))

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


def describe_high_rate(options: OptimizerOptions, step: int, total_steps: int) -> str | None:
    """Return that the learning rate had not come down after `step` steps; None where it had.

    A constant rate never comes down, so there is nothing to say about it.
    """
    span = options.learning_rate - options.lr_end
    if options.lr_scheduler == "constant" or span <= 0:
        return None
    rate = learning_rate(options, step, total_steps)
    if rate - options.lr_end < LOW_RATE * span:
        return None
    return (
        f"lr_scheduler {options.lr_scheduler} had not brought the learning rate down: it was still "
        f"at {rate / options.learning_rate:.0%} of learning_rate, so the run has no steps at low "
        f"rates. With max_train_steps {step} a run ends with them"
    )
