"""The table of optimizers, gradient clipping, and the two modes of the schedule-free one.

Every trainable parameter is decayed alike. The loop sets every group's "lr" before each step.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from optimi import Lion
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Optimizer

from simpletuner.config.optimizer_arguments import parse_optimizer_arguments
from simpletuner.config.schema import OptimizerOptions
from simpletuner.errors import ConfigError
from simpletuner.training.eight_bit_moments import EightBitMoments
from simpletuner.training.muon import Muon
from simpletuner.training.optimizer_offload import copy_to_pinned_host
from simpletuner.training.stochastic_adamw import SameDtypeMoments, StochasticAdamW

NamedParameters = Sequence[tuple[str, nn.Parameter]]

# Where torch steps AdamW in one pass, without a temporary. Nowhere by foreach: it copies all there is.
FUSED_ADAMW_DEVICES = ("cuda", "cpu", "mps")


class ScheduleFreeAdamW(AdamWScheduleFree):
    """The library's, with exact changes of mode: showing the average and coming back changes no bit.

    The library interpolates between its two points, which rounds; here the training point is kept, as
    part of the state, while the average is shown. A state saved in either mode resumes training exactly.
    """

    @torch.no_grad()
    def eval(self) -> None:
        group = self.param_groups[0]
        if group["train_mode"]:
            points = [param.detach().clone() for param in group["params"]]
            super().eval()
            for param, point in zip(group["params"], points):
                self.state[param]["training_point"] = point

    @torch.no_grad()
    def train(self) -> None:
        group = self.param_groups[0]
        if not group["train_mode"]:
            for param in group["params"]:
                point = self.state[param].pop("training_point", None)
                if point is not None:
                    param.copy_(point)
            group["train_mode"] = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The weights are loaded before this; they are set to the training point and the mode to training."""
        super().load_state_dict(state_dict)
        self.train()


@dataclass(frozen=True)
class OptimizerSpec:
    """What is to be made. extras: what optimizer_config says, in the library's words."""

    params: list[nn.Parameter]
    options: OptimizerOptions
    extra_arguments: dict[str, Any]
    seed: int

    def adam_arguments(self) -> dict[str, Any]:
        options = self.options
        return {
            "lr": options.learning_rate,
            "betas": (options.adam_beta1, options.adam_beta2),
            "eps": options.adam_epsilon,
            "weight_decay": options.adam_weight_decay,
            **self.extra_arguments,
        }


def _adamw(recipe: OptimizerSpec) -> Optimizer:
    fused = all(param.device.type in FUSED_ADAMW_DEVICES for param in recipe.params)
    return AdamW(recipe.params, **recipe.adam_arguments(), fused=fused, foreach=False)


def _stochastic_adamw(
    moments: type[SameDtypeMoments | EightBitMoments],
) -> Callable[[OptimizerSpec], Optimizer]:
    return lambda recipe: StochasticAdamW(
        recipe.params, **recipe.adam_arguments(), seed=recipe.seed, moments=moments()
    )


def _adafactor(recipe: OptimizerSpec) -> Optimizer:
    options, extras = recipe.options, dict(recipe.extra_arguments)
    eps = (extras.pop("eps1", None), extras.pop("eps2", 1e-3))
    arguments = {"foreach": False, "weight_decay": options.adam_weight_decay, **extras}
    return Adafactor(recipe.params, options.learning_rate, eps=eps, **arguments)


def _lion(recipe: OptimizerSpec) -> Optimizer:
    options, extras = recipe.options, dict(recipe.extra_arguments)
    betas = (extras.pop("beta1", 0.9), extras.pop("beta2", 0.99))
    # One implementation on every device: which one runs is part of the state, and must not change it.
    arguments = {
        "triton": False,
        "foreach": False,
        "weight_decay": options.adam_weight_decay,
        **extras,
    }
    return Lion(recipe.params, options.learning_rate, betas=betas, **arguments)


def _prodigy(recipe: OptimizerSpec) -> Optimizer:
    with contextlib.redirect_stdout(io.StringIO()):  # it announces its weight decay by print
        return Prodigy(recipe.params, **recipe.adam_arguments())


def _schedule_free(recipe: OptimizerSpec) -> Optimizer:
    optimizer = ScheduleFreeAdamW(recipe.params, **recipe.adam_arguments(), foreach=False)
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
    "muon": lambda recipe: Muon(recipe.params, **recipe.adam_arguments(), seed=recipe.seed),
}


def build_optimizer(options: OptimizerOptions, params: NamedParameters, seed: int) -> Optimizer:
    """The optimizer over `params` in their order, in training mode. ConfigError for a bad optimizer_config.

    adamw_bf16 keeps its moments in the weights' dtype, adamw_8bit in 2 bytes; both, and muon, round what is
    bf16 stochastically. lion has betas of its own (0.9, 0.99), not adam_beta1 and adam_beta2. prodigy finds
    the rate itself: learning_rate is a factor on it, usually 1. muon shares learning_rate between matrices
    and the rest.
    """
    recipe = OptimizerSpec(
        [param for _, param in params], options, parse_optimizer_arguments(options), seed
    )
    try:
        optimizer = OPTIMIZERS[options.optimizer](recipe)
    except ValueError as error:  # bounds that the libraries check
        raise ConfigError(f"optimizer {options.optimizer}: {error}") from error
    hosted = is_state_offloaded(options, recipe.params[0].device)
    preserve_state_dtypes_on_load(
        optimizer,
        lambda tensor, param: copy_to_pinned_host(tensor) if hosted else tensor.to(param.device),
    )
    return optimizer


def is_state_offloaded(options: OptimizerOptions, device: torch.device) -> bool:
    """Whether the states live in host memory, and that is another than the device's."""
    return options.optimizer_cpu_offload_method == "states" and device.type == "cuda"


StatePlacement = Callable[
    [Tensor, Tensor], Tensor
]  # a state tensor and its parameter -> where it is kept


def preserve_state_dtypes_on_load(optimizer: Optimizer, place: StatePlacement) -> None:
    """From now on load_state_dict keeps every dtype; torch's own casts codes and scales to the weights'."""
    waiting: dict[int, dict[str, Tensor]] = {}

    def take(optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        waiting.clear()
        rest: dict[int, dict[str, Any]] = {}
        for index, values in given["state"].items():
            waiting[index] = {
                key: value for key, value in values.items() if torch.is_tensor(value) and value.ndim
            }
            rest[index] = {key: value for key, value in values.items() if key not in waiting[index]}
        return {**given, "state": rest}

    def put(optimizer: Optimizer) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for index, tensors in waiting.items():
            optimizer.state[params[index]].update(
                {key: place(tensor, params[index]) for key, tensor in tensors.items()}
            )
        waiting.clear()

    optimizer.register_load_state_dict_pre_hook(take)
    optimizer.register_load_state_dict_post_hook(put)


def set_optimizer_mode(optimizer: Optimizer, training: bool) -> None:
    """Show the weights to train (True) or to look at and export (False). Only schedule-free has two kinds.

    The way there and back is exact; a checkpoint may be taken in either mode.
    """
    if isinstance(optimizer, ScheduleFreeAdamW):
        (optimizer.train if training else optimizer.eval)()


def gradient_norm(gradient: Tensor) -> Tensor:
    """float32, also where the gradient is bf16."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(list(norms))) if norms else torch.zeros(())


def clip_gradients(params: Sequence[nn.Parameter], options: OptimizerOptions) -> float:
    """Limit the gradients as the options say. Returns their whole norm before that, finite or not."""
    with_gradient = [param for param in params if param.grad is not None]
    norm = total_norm(
        [gradient_norm(param.grad) for param in with_gradient if param.grad is not None]
    )
    if options.max_grad_norm > 0 and options.grad_clip_method == "norm":
        nn.utils.clip_grads_with_norm_(with_gradient, options.max_grad_norm, norm, foreach=False)
    elif options.max_grad_norm > 0:
        nn.utils.clip_grad_value_(with_gradient, options.max_grad_norm, foreach=False)
    return float(norm)
