"""AdamW for bf16 weights without a float32 copy: float32 updates, rounded stochastically."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from simpletuner.training.eight_bit_moments import BLOCK_SIZE, EightBitMoments
from simpletuner.training.flat_parameters import FlatGroup, FlatLayout, FlatParameter
from simpletuner.training.independent_parameter_optimizer import IndependentParameterOptimizer
from simpletuner.training.rounding_noise import RoundingNoise, copy_stochastically

# Numbers that are computed in float32 at a time: about nine temporary tensors of 16 MB, for a
# parameter of any size.
CHUNK_SIZE = 1 << 22


class SameDtypeMoments:
    """Moments in the dtype of the weights: 4 bytes per bf16 parameter, rounded stochastically.

    The moments are the mean of the gradient and the mean of its square. `read` returns both as
    (numbers,) float32 for a part of the flattened parameter; `write` stores them again. per_weight:
    whether a state tensor has the parameter's shape, and so no padding.
    """

    per_weight = True

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        flat = torch.contiguous_format
        return {
            key: torch.zeros_like(param, memory_format=flat) for key in ("exp_avg", "exp_avg_sq")
        }

    def read(self, state: dict[str, Tensor], part: slice) -> tuple[Tensor, Tensor]:
        return state["exp_avg"].view(-1)[part].float(), state["exp_avg_sq"].view(-1)[part].float()

    def write(
        self,
        state: dict[str, Tensor],
        part: slice,
        mean: Tensor,
        square: Tensor,
        noise: RoundingNoise,
    ) -> None:
        copy_stochastically(state["exp_avg"].view(-1)[part], mean, noise, 1, part)
        copy_stochastically(state["exp_avg_sq"].view(-1)[part], square, noise, 2, part)


class StochasticAdamW(IndependentParameterOptimizer):
    """AdamW with decoupled weight decay; bf16 weights are rounded stochastically.

    Weights of another dtype get the same update as from torch's AdamW.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int,
        moments: SameDtypeMoments | EightBitMoments,
    ) -> None:
        super().__init__(
            params, seed, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.moments = moments
        self._layouts: dict[int, FlatLayout] = {}

    def update_parameters(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Update small parameters in groups, and the others one by one; the numbers are the same.

        Small parameters alone would cost about 80 operations each.
        """
        small = [param for param in params if self._is_small(param)]
        if len(small) < 2:
            super().update_parameters(params, group)
            return
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for param in small:
            kinds.setdefault((param.dtype, param.device), []).append(param)
        for same_kind in kinds.values():
            layout = self._layout_of(same_kind)
            noises = layout.noise(self.seed, group["step"])
            for flat, noise in zip(layout.groups, noises, strict=True):
                self._update_group(flat, group, noise)
        chosen = set(small)
        super().update_parameters([param for param in params if param not in chosen], group)

    def _is_small(self, param: Tensor) -> bool:
        return (
            0 < param.numel() <= CHUNK_SIZE
            and param.is_contiguous()
            and self.first_number.get(param, 0) % BLOCK_SIZE == 0
        )

    def _layout_of(self, params: Sequence[Tensor]) -> FlatLayout:
        """Return the layout of these parameters; the latest one is kept for each first parameter.

        Parameters with a rate of their own are stepped apart, and each group has a layout.
        """
        key = self.parameter_index[params[0]]
        layout = self._layouts.get(key)
        if layout is None or [id(each.param) for each in layout.parameters] != list(
            map(id, params)
        ):
            placed = [
                FlatParameter(param, self.parameter_index[param], self.first_number.get(param, 0))
                for param in params
            ]
            layout = self._layouts[key] = FlatLayout(placed, self.lanes(params[0].device))
        return layout

    def _update_group(self, flat: FlatGroup, group: dict[str, Any], noise: RoundingNoise) -> None:
        params = [each.param for each in flat.parameters]
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            if not state:
                state.update(self.moments.init_state(param))
        gradients = [param.grad for param in params if param.grad is not None]
        weights, grad = flat.gather(params), flat.gather(gradients)
        per_weight = self.moments.per_weight
        gathered = {}
        for key in states[0]:
            held = [state[key] for state in states]
            gathered[key] = flat.gather(held) if per_weight else torch.cat(held)
        whole = slice(0, flat.numbers)
        self._update_chunk(weights, grad, gathered, whole, group, noise, flat.clear_padding)
        flat.scatter(weights, params)
        for key, tensor in gathered.items():
            held = [state[key] for state in states]
            if per_weight:
                flat.scatter(tensor, held)
            else:
                torch._foreach_copy_(held, tensor.split([len(part) for part in held]))

    def update_parameter(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], noise: RoundingNoise
    ) -> None:
        state = self.state[param]
        if not state:
            state.update(self.moments.init_state(param))
        weights, gradient = param.contiguous().view(-1), grad.reshape(-1)
        for start in range(0, param.numel(), CHUNK_SIZE):
            part = slice(start, min(start + CHUNK_SIZE, param.numel()))
            self._update_chunk(weights[part], gradient[part], state, part, group, noise)
        if not param.is_contiguous():
            param.copy_(weights.view_as(param))

    def _update_chunk(
        self,
        weights: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        part: slice,
        group: dict[str, Any],
        noise: RoundingNoise,
        clear_padding: Callable[[Tensor], None] = lambda flat: None,
    ) -> None:
        beta1, beta2 = group["betas"]
        exact_grad = grad.float()
        mean, square = self.moments.read(state, part)
        # 8-bit codes have no 0 for the mean of squares, so padding would not stay 0.
        clear_padding(mean)
        clear_padding(square)
        mean.lerp_(exact_grad, 1 - beta1)
        square.mul_(beta2).addcmul_(exact_grad, exact_grad, value=1 - beta2)
        del exact_grad  # memory, here and below
        # eps is added after the bias correction, as torch does.
        denominator = square.sqrt().div_(math.sqrt(1 - beta2 ** group["step"])).add_(group["eps"])
        # In the order of torch's AdamW: first the decay of the weights, then the update.
        new = weights.float().mul_(1 - group["lr"] * group["weight_decay"])
        new.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1 ** group["step"]))
        del denominator
        copy_stochastically(weights, new, noise, 0, part)
        del new
        self.moments.write(state, part, mean, square, noise)
