"""From losses to changed weights: how the gradients of a step are made, limited, applied and freed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.config.schema import OptimizerOptions
from simpletuner.training.optimizer_offload import OffloadedOptimizerState
from simpletuner.training.optimizers import (
    clip_gradients,
    gradient_norm,
    is_state_offloaded,
    total_norm,
)


class OptimizerStep(ABC):
    """One optimizer step: backward for every micro-batch, limit, apply unless the step is bad, clear."""

    weights_modified = (
        False  # whether weights have changed before `apply`: then a bad step cannot be skipped
    )

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Make the gradients of a micro-batch's share of the loss."""

    @abstractmethod
    def clip_gradients(self) -> float:
        """Clip as the options say. Returns the norm of the whole gradient before that, finite or not."""

    @abstractmethod
    def apply(self) -> None:
        """Change the weights."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Free the gradients."""


class SingleParameterStepper:
    """Steps the parameters of an optimizer one by one, its group's counters only once for all of them."""

    def __init__(self, optimizer: Optimizer, states: OffloadedOptimizerState | None) -> None:
        self.optimizer, self.offloaded_state = optimizer, states
        self.group_counters: dict[str, object] = {}

    def step(self, param: nn.Parameter) -> None:
        (group,) = self.optimizer.param_groups
        before = dict(group)
        group["params"] = [param]
        if self.offloaded_state is None:
            self.optimizer.step()
        else:
            with self.offloaded_state.on_device(param):
                self.optimizer.step()
        self.group_counters = {key: value for key, value in group.items() if key != "params"}
        group.update(before)

    def finish_step(self) -> None:
        """All are stepped."""
        self.optimizer.param_groups[0].update(self.group_counters)
        if self.offloaded_state is not None:
            self.offloaded_state.synchronize()


class StandardOptimizerStep(OptimizerStep):
    """All gradients first, then all steps; one after the other where their states are in host memory."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        optimizer: Optimizer,
        options: OptimizerOptions,
        states: OffloadedOptimizerState | None = None,
    ) -> None:
        self.params, self.optimizer, self.options = params, optimizer, options
        self.stepper = None if states is None else SingleParameterStepper(optimizer, states)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_gradients(self) -> float:
        return clip_gradients(self.params, self.options)

    def apply(self) -> None:
        if self.stepper is None:
            self.optimizer.step()
            return
        for param in self.params:
            if param.grad is not None:
                self.stepper.step(param)
        self.stepper.finish_step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class OptimizerStepInBackward(OptimizerStep):
    """A parameter is stepped as soon as its gradient is there, inside the backward pass, which then frees it.

    Same numbers, without the gradients' memory. For one backward pass a step, and a limit that looks at each
    number alone. Nothing is done for a loss that is not finite; a gradient that is not finite spoils weights.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        alone: SingleParameterStepper,
        options: OptimizerOptions,
    ) -> None:
        self.params, self.stepper, self.max_gradient_value = params, alone, options.max_grad_norm
        self.gradient_norms: dict[nn.Parameter, Tensor] = {}
        for param in params:
            param.register_post_accumulate_grad_hook(self._step_parameter)

    def _step_parameter(self, param: Tensor) -> None:
        assert isinstance(param, nn.Parameter)
        assert param.grad is not None
        self.gradient_norms[param] = gradient_norm(param.grad)
        if self.max_gradient_value > 0:
            param.grad.clamp_(-self.max_gradient_value, self.max_gradient_value)
        self.stepper.step(param)
        param.grad = None

    def backward(self, loss: Tensor) -> None:
        self.weights_modified = math.isfinite(loss.item())
        if self.weights_modified:
            loss.backward()

    def clip_gradients(self) -> float:
        norms = [
            self.gradient_norms[param] for param in self.params if param in self.gradient_norms
        ]
        self.gradient_norms.clear()
        return float(total_norm(norms)) if self.weights_modified else math.nan

    def apply(self) -> None:
        self.stepper.finish_step()

    def zero_grad(self) -> None:
        self.weights_modified = False


def make_optimizer_step(
    params: Sequence[nn.Parameter], optimizer: Optimizer, options: OptimizerOptions
) -> OptimizerStep:
    """What the options ask for; the config has refused what cannot go together."""
    states = (
        OffloadedOptimizerState(optimizer)
        if is_state_offloaded(options, params[0].device)
        else None
    )
    if options.optimizer_release_gradients:
        return OptimizerStepInBackward(params, SingleParameterStepper(optimizer, states), options)
    return StandardOptimizerStep(params, optimizer, options, states)
