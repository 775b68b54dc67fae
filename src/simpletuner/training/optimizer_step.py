"""The optimizer step: how the gradients of a step are computed, clipped, applied and freed.

The order of one step, and why (loop.py runs it):

1. `backward` for every micro-batch. Gradients accumulate in `param.grad`; each loss is already
   divided by the samples of the whole step, so the sum is the gradient of the step's mean loss.
   Over several processes, and in a fixed order: gradient_sum.py.
2. `clip_gradients` once, on the whole gradient: the norm of one micro-batch says nothing about the
   step. It returns the norm before clipping, because that is what is logged and checked.
3. If the loss and the norm are finite, `apply`. If not, the step is skipped: the optimizer's
   moments do not see such gradients, which would spoil every later step.
4. The average (EMA) is updated after `apply` and only then, so it averages weights that existed; a
   skipped step is not counted in it.
5. `zero_grad` in either case, so that a skipped gradient does not leak into the next step.

A strategy implements steps 1, 2, 3 and 5. The loop knows only the abstract class; a new strategy is
a class and a row in OPTIMIZER_STEPS.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.config.schema import OptimizerOptions
from simpletuner.training.gradient_sum import GradientSum, make_buckets
from simpletuner.training.optimizer_offload import OffloadedOptimizerState
from simpletuner.training.optimizers import is_state_offloaded

# Numbers of a gradient whose norm is taken at a time: their float64 copy has 2 MB on a CPU, which
# stays near its cache, and 32 MB where a GPU needs one. The factors of a LoRA are smaller.
CPU_NORM_PART = 1 << 18
GPU_NORM_PART = 1 << 22


class OptimizerStep(ABC):
    """A strategy for one optimizer step.

    offloaded_state: moves optimizer state from host memory to the device and back, parameter by
    parameter; None where the state stays with the optimizer. weights_modified: whether weights have
    changed before `apply`; a step that is not finite can then not be skipped.
    """

    weights_modified = False

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        optimizer: Optimizer,
        options: OptimizerOptions,
        gradient_sum: GradientSum,
        offloaded_state: OffloadedOptimizerState | None = None,
    ) -> None:
        self.params = params
        self.optimizer = optimizer
        self.options = options
        self.gradient_sum = gradient_sum
        self.offloaded_state = offloaded_state

    @abstractmethod
    def backward(self, loss: Tensor, place: int) -> None:
        """Add the gradients of one micro-batch's part of the loss.

        place: number of the micro-batch within the step.
        """

    @abstractmethod
    def clip_gradients(self) -> Tensor:
        """Complete the sum of the gradients, and clip it as the options say.

        Returns the norm of the whole gradient before clipping, () float32 on the device, which may
        not be finite. Reading it makes the host wait, so the loop reads it together with the loss.
        """

    @abstractmethod
    def apply(self) -> None:
        """Change the weights."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Free the gradients."""


class StandardOptimizerStep(OptimizerStep):
    """Compute all gradients, then step all parameters together."""

    def backward(self, loss: Tensor, place: int) -> None:
        loss.backward()
        self.gradient_sum.add(place)

    def clip_gradients(self) -> Tensor:
        self.gradient_sum.finish()
        return clip_gradients(self.params, self.options, self.gradient_sum.sum_over_ranks)

    def apply(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class PerParameterOptimizerStep(StandardOptimizerStep):
    """Compute all gradients, then step the parameters one by one.

    Only the state of the parameter that is stepped has to be on the device.
    """

    def apply(self) -> None:
        stepper = SingleParameterStepper(self.optimizer, self.offloaded_state)
        for param in self.params:
            if param.grad is not None:
                stepper.step(param)
        stepper.finish_step()


class OptimizerStepInBackward(OptimizerStep):
    """Step each parameter during the backward pass, as soon as its gradient exists, then free it.

    The numbers are the same, without the memory of the gradients. It works for one backward pass
    per step and for clipping each number by itself: a norm is known only at the end, after most
    weights have changed. A loss that is not finite changes nothing; a gradient that is not finite
    spoils the weights, which is why the run then stops (weights_modified).
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        optimizer: Optimizer,
        options: OptimizerOptions,
        gradient_sum: GradientSum,
        offloaded_state: OffloadedOptimizerState | None = None,
    ) -> None:
        super().__init__(params, optimizer, options, gradient_sum, offloaded_state)
        self.stepper = SingleParameterStepper(optimizer, offloaded_state)
        self.gradient_norms: dict[nn.Parameter, list[Tensor]] = {}
        for param in params:
            param.register_post_accumulate_grad_hook(self._step_parameter)

    def _step_parameter(self, param: Tensor) -> None:
        assert isinstance(param, nn.Parameter)
        assert param.grad is not None
        self.gradient_norms[param] = part_norms([param.grad])
        limit = self.options.max_grad_norm
        if limit > 0:
            param.grad.clamp_(-limit, limit)
        self.stepper.step(param)
        param.grad = None

    def backward(self, loss: Tensor, place: int) -> None:
        self.weights_modified = math.isfinite(loss.item())
        if self.weights_modified:
            loss.backward()

    def clip_gradients(self) -> Tensor:
        norms = [norm for param in self.params for norm in self.gradient_norms.get(param, ())]
        self.gradient_norms.clear()
        return total_norm(norms) if self.weights_modified else torch.tensor(math.nan)

    def apply(self) -> None:
        self.stepper.finish_step()

    def zero_grad(self) -> None:
        self.weights_modified = False


# Strategy by name. optimizer_step_name chooses; a new strategy is one row here.
OPTIMIZER_STEPS: dict[str, type[OptimizerStep]] = {
    "standard": StandardOptimizerStep,
    "per_parameter": PerParameterOptimizerStep,
    "in_backward": OptimizerStepInBackward,
}


def optimizer_step_name(options: OptimizerOptions, device: torch.device) -> str:
    """Return the key of OPTIMIZER_STEPS for parameters on this device.

    Combinations that a strategy cannot train are refused by config/constraints.py.
    """
    if options.optimizer_release_gradients:
        return "in_backward"
    return "per_parameter" if is_state_offloaded(options, device) else "standard"


def make_optimizer_step(
    name: str,
    params: Sequence[nn.Parameter],
    optimizer: Optimizer,
    options: OptimizerOptions,
    gradient_sum: GradientSum,
) -> OptimizerStep:
    """Build the strategy of that name, with offloaded state where the options ask for it."""
    offloaded = is_state_offloaded(options, params[0].device)
    state = OffloadedOptimizerState(optimizer) if offloaded else None
    return OPTIMIZER_STEPS[name](params, optimizer, options, gradient_sum, state)


class SingleParameterStepper:
    """Steps the parameters of an optimizer one by one.

    torch's optimizers step a whole group and advance the group's counters (such as the number of
    the step) in every call. Each call here therefore sees a group of one parameter with the
    counters of the step's start; `finish_step` writes the advanced counters once, so the state is
    the same as after one ordinary step.
    """

    def __init__(
        self, optimizer: Optimizer, offloaded_state: OffloadedOptimizerState | None
    ) -> None:
        self.optimizer = optimizer
        self.offloaded_state = offloaded_state
        self.group_counters: dict[int, dict[str, object]] = {}
        self.group_numbers = {
            param: number
            for number, group in enumerate(optimizer.param_groups)
            for param in group["params"]
        }

    def step(self, param: nn.Parameter) -> None:
        # The optimizer steps what its groups list: one group with one parameter, for this call.
        groups, number = self.optimizer.param_groups, self.group_numbers[param]
        group = groups[number]
        before = dict(group)
        group["params"] = [param]
        self.optimizer.param_groups = [group]
        if self.offloaded_state is None:
            self.optimizer.step()
        else:
            with self.offloaded_state.on_device(param):
                self.optimizer.step()
        self.optimizer.param_groups = groups
        # The counters after the step are kept apart and written once, by finish_step.
        self.group_counters[number] = {
            key: value for key, value in group.items() if key != "params"
        }
        group.update(before)

    def finish_step(self) -> None:
        """Advance the counters of the groups; call it after the last parameter of a step."""
        for number, counters in self.group_counters.items():
            self.optimizer.param_groups[number].update(counters)
        if self.offloaded_state is not None:
            self.offloaded_state.synchronize()


def part_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the norms of gradients, or of parts of large ones, () each, summed in float64.

    A float32 sum would depend on how a gradient is divided among processes. MPS has no float64.
    Parts bound the float64 copy that torch makes where it cannot sum in another dtype directly.
    """
    if not gradients:
        return []
    device = gradients[0].device.type
    dtype = torch.float32 if device == "mps" else torch.float64
    limit = CPU_NORM_PART if device == "cpu" else GPU_NORM_PART
    parts: list[Tensor] = []
    for gradient in gradients:
        is_small = gradient.numel() <= limit
        parts += [gradient] if is_small else gradient.reshape(-1).split(limit)
    return list(torch._foreach_norm(parts, 2, dtype))


def total_norm(
    norms: Sequence[Tensor], sum_over_ranks: Callable[[Tensor], Tensor] = lambda value: value
) -> Tensor:
    """Return the norm of the whole gradient from the norms of its parts, () float32.

    sum_over_ranks: sums the squares of the parts that other processes hold.
    """
    if not norms:
        return torch.zeros(())
    # The squares add up over ranks; the norms themselves would not.
    squares = torch.stack(list(norms)).square().sum()
    return sum_over_ranks(squares).sqrt().float()


def clip_gradients(
    params: Sequence[nn.Parameter],
    options: OptimizerOptions,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Clip the gradients in place, by their total norm or number by number.

    Returns their total norm before clipping, () float32, which may not be finite.
    """
    gradients = [param.grad for param in params if param.grad is not None]
    norm = total_norm(part_norms(gradients), sum_over_ranks)
    limit = options.max_grad_norm
    if limit <= 0:
        return norm
    for bucket in make_buckets(gradients):
        if options.grad_clip_method == "norm":
            # As torch.nn.utils.clip_grads_with_norm_ computes it.
            torch._foreach_mul_(bucket, (limit / (norm + 1e-6)).clamp(max=1.0))
        else:
            torch._foreach_clamp_min_(bucket, -limit)
            torch._foreach_clamp_max_(bucket, limit)
    return norm
