"""The table of optimizers, the learning-rate schedules, and the two modes of the schedule-free one.

Weight decay applies to every trainable parameter. The loop sets "lr" of every parameter group
before each step.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from optimi import Lion
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.optim import Adafactor, Optimizer

from simpletuner.config.optimizer_arguments import parse_optimizer_arguments
from simpletuner.config.schema import OptimizerOptions
from simpletuner.errors import ConfigError
from simpletuner.training.compiler_import import EagerAdamW
from simpletuner.training.eight_bit_moments import EightBitMoments
from simpletuner.training.gradient_sum import make_buckets
from simpletuner.training.grouped_prodigy import GroupedProdigy
from simpletuner.training.muon import Muon
from simpletuner.training.optimizer_offload import copy_to_pinned_host
from simpletuner.training.parameter_groups import group_parameters
from simpletuner.training.stochastic_adamw import SameDtypeMoments, StochasticAdamW

NamedParameters = Sequence[tuple[str, nn.Parameter]]
# A state tensor and its parameter -> the tensor that the optimizer holds.
StatePlacement = Callable[[Tensor, Tensor], Tensor]

# Devices where torch has a fused AdamW, which needs no temporary tensors. The foreach
# implementation is never used, because it copies every parameter.
FUSED_ADAMW_DEVICES = ("cuda", "cpu", "mps")

# Progress in [0, 1) after the warm-up, and lr_power -> the fraction of the way from lr_end to
# learning_rate.
LR_SCHEDULERS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, power: 1.0,
    "linear": lambda progress, power: 1.0 - progress,
    "cosine": lambda progress, power: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "polynomial": lambda progress, power: (1.0 - progress) ** power,
}


def learning_rate(options: OptimizerOptions, step: int, total_steps: int) -> float:
    """Return the rate of optimizer step `step` (0 is the first) of a run of `total_steps`.

    It is a pure function of the step, so there is nothing to save or resume. The warm-up rises
    linearly and reaches learning_rate at its last step, so no step has rate 0. The schedule then
    spans the remaining steps and would reach lr_end one step after the last.
    """
    warmup = options.lr_warmup_steps
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    fraction = LR_SCHEDULERS[options.lr_scheduler](progress, options.lr_power)
    return options.lr_end + (options.learning_rate - options.lr_end) * fraction


def effective_learning_rate(options: OptimizerOptions, effective_batch: int) -> float:
    """Return learning_rate times the samples of a step (lr_scale) or their root (lr_scale_sqrt).

    effective_batch: samples of one optimizer step, over accumulation and devices.
    """
    factor = float(effective_batch) if options.lr_scale else 1.0
    return options.learning_rate * (math.sqrt(effective_batch) if options.lr_scale_sqrt else factor)


# The libraries' steps without the wrapper that torch puts around them once an optimizer of the
# class exists: it calls the optimizer's hooks, which the subclass's own step has called already.
LION_STEP, SCHEDULE_FREE_STEP = inspect.unwrap(Lion.step), inspect.unwrap(AdamWScheduleFree.step)


def step_in_buckets(optimizer: Optimizer, step: Callable[[], object]) -> None:
    """Let the library's step see the parameters bucket by bucket, in its foreach implementation.

    An operation on a bucket replaces one for each parameter, and a bucket bounds the temporary
    copies. Counters of a group advance once. The saved settings do not name the implementation, so
    that checkpoints of both are equal.
    """
    groups = optimizer.param_groups
    for group in groups:
        before = dict(group)
        with_gradient = [param for param in group["params"] if param.grad is not None]
        optimizer.param_groups = [group]
        try:
            for bucket in list(make_buckets(with_gradient)) or [[]]:
                group.update({**before, "params": bucket, "foreach": True})
                step()
        finally:
            optimizer.param_groups = groups
            group.update({"params": before["params"], "foreach": before["foreach"]})


class ForeachLion(Lion):  # type: ignore[misc]  # the library is untyped
    """The library's optimizer on many parameters at a time; the numbers are the same."""

    @torch.no_grad()
    def step(self, closure: None = None, param: None = None) -> None:
        step_in_buckets(self, partial(LION_STEP, self))


class ScheduleFreeAdamW(AdamWScheduleFree):  # type: ignore[misc]  # the library is untyped
    """The library's optimizer on many parameters at a time, with exact changes of mode.

    eval() and train() restore every bit.

    The library interpolates between its two points, which rounds. Here the training point is stored
    in the state while the averaged weights are in use. A state that is saved in either mode resumes
    training exactly.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        step_in_buckets(self, partial(SCHEDULE_FREE_STEP, self))

    @torch.no_grad()
    def eval(self) -> None:
        if self.param_groups[0]["train_mode"]:
            points = [(param, param.detach().clone()) for param in self._all_parameters()]
            super().eval()
            for param, point in points:
                self.state[param]["training_point"] = point

    @torch.no_grad()
    def train(self) -> None:
        if not self.param_groups[0]["train_mode"]:
            for param in self._all_parameters():
                point = self.state[param].pop("training_point", None)
                if point is not None:
                    param.copy_(point)
            for group in self.param_groups:
                group["train_mode"] = True

    def _all_parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, and set weights and mode to the training point.

        The weights must be loaded before this.
        """
        super().load_state_dict(state_dict)
        self.train()


@dataclass(frozen=True)
class OptimizerSpec:
    """The arguments for an optimizer. extra_arguments: optimizer_config, in the library's names.

    params: the parameters, or groups of them.
    """

    params: list[Any]
    options: OptimizerOptions
    extra_arguments: dict[str, Any]
    seed: int
    device_types: frozenset[str]

    def adam_arguments(self) -> dict[str, Any]:
        options = self.options
        return {
            "lr": options.learning_rate,
            "betas": (options.adam_beta1, options.adam_beta2),
            "eps": options.adam_epsilon,
            "weight_decay": options.adam_weight_decay,
            **self.extra_arguments,
        }


def _adamw(spec: OptimizerSpec) -> Optimizer:
    fused = all(device in FUSED_ADAMW_DEVICES for device in spec.device_types)
    return EagerAdamW(spec.params, **spec.adam_arguments(), fused=fused, foreach=False)


def _stochastic_adamw(
    moments: type[SameDtypeMoments | EightBitMoments],
) -> Callable[[OptimizerSpec], Optimizer]:
    return lambda spec: StochasticAdamW(
        spec.params, **spec.adam_arguments(), seed=spec.seed, moments=moments()
    )


def _adafactor(spec: OptimizerSpec) -> Optimizer:
    extra = dict(spec.extra_arguments)
    eps = (extra.pop("eps1", None), extra.pop("eps2", 1e-3))
    arguments = {"foreach": False, "weight_decay": spec.options.adam_weight_decay, **extra}
    return Adafactor(spec.params, spec.options.learning_rate, eps=eps, **arguments)


def _lion(spec: OptimizerSpec) -> Optimizer:
    extra = dict(spec.extra_arguments)
    betas = (extra.pop("beta1", 0.9), extra.pop("beta2", 0.99))
    # The choice of implementation is part of the saved state, so it must not depend on the device.
    arguments = {
        "triton": False,
        "foreach": False,
        "weight_decay": spec.options.adam_weight_decay,
        **extra,
    }
    return ForeachLion(spec.params, spec.options.learning_rate, betas=betas, **arguments)


def _prodigy(spec: OptimizerSpec) -> Optimizer:
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its kind of weight decay
        return GroupedProdigy(spec.params, **spec.adam_arguments())


def _schedule_free(spec: OptimizerSpec) -> Optimizer:
    optimizer = ScheduleFreeAdamW(spec.params, **spec.adam_arguments(), foreach=False)
    optimizer.train()
    return optimizer


OPTIMIZERS: Mapping[str, Callable[[OptimizerSpec], Optimizer]] = {
    "adamw": _adamw,
    "adamw_bf16": _stochastic_adamw(SameDtypeMoments),
    "adamw_8bit": _stochastic_adamw(EightBitMoments),
    "adafactor": _adafactor,
    "lion": _lion,
    "prodigy": _prodigy,
    "adamw_schedulefree": _schedule_free,
    "muon": lambda spec: Muon(spec.params, **spec.adam_arguments(), seed=spec.seed),
}


def build_optimizer(
    options: OptimizerOptions,
    params: NamedParameters,
    seed: int,
    factors: Mapping[str, float] = MappingProxyType({}),
) -> Optimizer:
    """Return the optimizer over `params` in their order, in training mode.

    factors: name -> factor on the learning rate, 1 where there is none; parameters of equal factor
    form a group.

    adamw_bf16 holds its moments in the dtype of the weights, adamw_8bit in 2 bytes per weight;
    both, and muon, round bf16 weights stochastically. lion has betas of its own (0.9, 0.99), not
    adam_beta1 and adam_beta2. prodigy estimates the rate itself: learning_rate is a factor on it,
    usually 1. muon uses learning_rate for matrices and for the other parameters.

    Raises ConfigError when a value of optimizer_config is out of bounds.
    """
    spec = OptimizerSpec(
        group_parameters(params, factors),
        options,
        parse_optimizer_arguments(options),
        seed,
        frozenset(param.device.type for _, param in params),
    )
    try:
        optimizer = OPTIMIZERS[options.optimizer](spec)
    except ValueError as error:  # the libraries check the bounds of their arguments
        raise ConfigError(f"optimizer {options.optimizer}: {error}") from error
    offloaded = is_state_offloaded(options, params[0][1].device)
    preserve_state_dtypes_on_load(
        optimizer,
        lambda tensor, param: copy_to_pinned_host(tensor) if offloaded else tensor.to(param.device),
    )
    return optimizer


def is_state_offloaded(options: OptimizerOptions, device: torch.device) -> bool:
    """Return whether the state is in host memory, which only a discrete GPU has apart."""
    return options.optimizer_cpu_offload_method == "states" and device.type == "cuda"


def preserve_state_dtypes_on_load(optimizer: Optimizer, place: StatePlacement) -> None:
    """Make load_state_dict keep the dtype of every state tensor.

    torch's own load_state_dict casts state to the dtype of the weights, which destroys 8-bit codes
    and rounds scales. A hook takes the tensors out before torch loads the rest, and a second hook
    puts them in afterwards, placed by `place`.
    """
    removed: dict[int, dict[str, Tensor]] = {}

    def remove_tensors(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        removed.clear()
        rest: dict[int, dict[str, Any]] = {}
        for index, values in state_dict["state"].items():
            removed[index] = {
                key: value for key, value in values.items() if torch.is_tensor(value) and value.ndim
            }
            rest[index] = {key: value for key, value in values.items() if key not in removed[index]}
        return {**state_dict, "state": rest}

    def restore_tensors(optimizer: Optimizer) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for index, tensors in removed.items():
            optimizer.state[params[index]].update(
                {key: place(tensor, params[index]) for key, tensor in tensors.items()}
            )
        removed.clear()

    optimizer.register_load_state_dict_pre_hook(remove_tensors)
    optimizer.register_load_state_dict_post_hook(restore_tensors)


def set_optimizer_mode(optimizer: Optimizer, training: bool) -> None:
    """Put the weights to train (True) or to evaluate and export (False) into the parameters.

    Only the schedule-free optimizer has two kinds of weights. Changing the mode and changing it
    back is exact, and a checkpoint may be saved in either mode.
    """
    if isinstance(optimizer, ScheduleFreeAdamW):
        (optimizer.train if training else optimizer.eval)()
