"""From losses to changed weights: how the gradients of a step are made, limited, applied and freed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.config.schema import OptimizerOptions
from simpletuner.training.host_states import HostStates
from simpletuner.training.optimizers import clip_gradients, is_hosted, norm_of, whole_norm


class Update(ABC):
    """One optimizer step: backward for every micro-batch, limit, apply unless the step is bad, clear."""

    touched = False  # whether weights have changed before `apply`: then a bad step cannot be skipped

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Make the gradients of a micro-batch's share of the loss."""

    @abstractmethod
    def limit(self) -> float:
        """Clip as the options say. Returns the norm of the whole gradient before that, finite or not."""

    @abstractmethod
    def apply(self) -> None:
        """Change the weights."""

    @abstractmethod
    def clear(self) -> None:
        """Free the gradients."""


class Alone:
    """Steps the parameters of an optimizer one by one, its group's counters only once for all of them."""

    def __init__(self, optimizer: Optimizer, states: HostStates | None) -> None:
        self.optimizer, self.states = optimizer, states
        self.counters: dict[str, object] = {}

    def step(self, param: nn.Parameter) -> None:
        (group,) = self.optimizer.param_groups
        before = dict(group)
        group["params"] = [param]
        if self.states is None:
            self.optimizer.step()
        else:
            with self.states.visit(param):
                self.optimizer.step()
        self.counters = {key: value for key, value in group.items() if key != "params"}
        group.update(before)

    def finish(self) -> None:
        """All are stepped."""
        self.optimizer.param_groups[0].update(self.counters)
        if self.states is not None:
            self.states.settle()


class Whole(Update):
    """All gradients first, then all steps; one after the other where their states are in host memory."""

    def __init__(
        self, params: Sequence[nn.Parameter], optimizer: Optimizer, options: OptimizerOptions,
        states: HostStates | None = None,
    ) -> None:  # fmt: skip
        self.params, self.optimizer, self.options = params, optimizer, options
        self.alone = None if states is None else Alone(optimizer, states)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def limit(self) -> float:
        return clip_gradients(self.params, self.options)

    def apply(self) -> None:
        if self.alone is None:
            self.optimizer.step()
            return
        for param in self.params:
            if param.grad is not None:
                self.alone.step(param)
        self.alone.finish()

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class Released(Update):
    """A parameter is stepped as soon as its gradient is there, inside the backward pass, which then frees it.

    Same numbers, without the gradients' memory. For one backward pass a step, and a limit that looks at each
    number alone. Nothing is done for a loss that is not finite; a gradient that is not finite spoils weights.
    """

    def __init__(self, params: Sequence[nn.Parameter], alone: Alone, options: OptimizerOptions) -> None:
        self.params, self.alone, self.largest = params, alone, options.max_grad_norm
        self.norms: dict[nn.Parameter, Tensor] = {}
        for param in params:
            param.register_post_accumulate_grad_hook(self._consume)

    def _consume(self, param: Tensor) -> None:
        assert isinstance(param, nn.Parameter)
        assert param.grad is not None
        self.norms[param] = norm_of(param.grad)
        if self.largest > 0:
            param.grad.clamp_(-self.largest, self.largest)
        self.alone.step(param)
        param.grad = None

    def backward(self, loss: Tensor) -> None:
        self.touched = math.isfinite(loss.item())
        if self.touched:
            loss.backward()

    def limit(self) -> float:
        norms = [self.norms[param] for param in self.params if param in self.norms]
        self.norms.clear()
        return float(whole_norm(norms)) if self.touched else math.nan

    def apply(self) -> None:
        self.alone.finish()

    def clear(self) -> None:
        self.touched = False


def update_of(params: Sequence[nn.Parameter], optimizer: Optimizer, options: OptimizerOptions) -> Update:
    """What the options ask for; the config has refused what cannot go together."""
    states = HostStates(optimizer) if is_hosted(options, params[0].device) else None
    if options.optimizer_release_gradients:
        return Released(params, Alone(optimizer, states), options)
    return Whole(params, optimizer, options, states)
