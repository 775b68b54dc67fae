from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from simpletuner.adapters.adapted_linear import LoraLinear
from simpletuner.adapters.dora_linear import DoraLinear


def pair(
    dtype: torch.dtype, master: torch.dtype, bias: bool = True, dropout: float = 0.0
) -> tuple[LoraLinear, PeftLinear]:
    """Ours and PEFT's own on one frozen base, same factors."""
    torch.manual_seed(0)
    base = nn.Linear(24, 40, bias=bias).to(dtype).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=7, lora_dropout=dropout)
    theirs = PeftLinear(base, "default", config=config, r=4, lora_alpha=7)
    down, up = torch.randn(4, 24).to(master), torch.randn(40, 4).to(master)
    theirs.lora_A["default"].weight = nn.Parameter(down.clone())
    theirs.lora_B["default"].weight = nn.Parameter(up.clone())
    return LoraLinear(base, down.clone(), up.clone(), 7 / 4, dropout), theirs


def factors(layer: nn.Module) -> list[nn.Parameter]:
    if isinstance(layer, LoraLinear):
        return [layer.down, layer.up]
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def outputs_and_gradients(
    layer: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x) if call is None else call(layer, x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(factor.grad for factor in factors(layer))]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


class Dequantised(nn.Module):
    """Stands for a base that is no nn.Linear: the weight exists only inside forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("rows", linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rows * 1.0)


@pytest.mark.parametrize(
    ("dtype", "bias", "shape"),
    itertools.product([torch.float64, torch.float32], [True, False], [(3, 5, 24), (7, 24)]),
)
def test_equals_peft_in_output_and_every_gradient(dtype, bias, shape):
    ours, theirs = pair(dtype, dtype, bias)
    x = torch.randn(shape, dtype=dtype)
    limit = 1e-13 if dtype == torch.float64 else 1e-6
    for a, b in zip(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x)):
        assert relative(a, b) < limit


def test_non_contiguous_input_and_slices():
    ours, theirs = pair(torch.float64, torch.float64)
    x = torch.randn(24, 6, 2, dtype=torch.float64).permute(2, 1, 0)[:, 1:4]
    for a, b in zip(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x)):
        assert relative(a, b) < 1e-13


def test_gradcheck():
    ours, _ = pair(torch.float64, torch.float64)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x,))
    ours.base_layer = Dequantised(ours.base_layer)  # takes the other path
    assert torch.autograd.gradcheck(ours, (x,))


def test_any_module_may_be_the_base():
    ours, theirs = pair(torch.float64, torch.float64, bias=False)
    ours.base_layer = Dequantised(theirs.base_layer)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    for a, b in zip(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x)):
        assert relative(a, b) < 1e-13


def test_input_without_gradient_still_trains_the_factors():
    ours, theirs = pair(torch.float64, torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    for mine, other in zip(factors(ours), factors(theirs)):
        assert relative(mine.grad, other.grad) < 1e-13


def test_dropout_draws_the_same_mask_as_peft_and_survives_checkpointing():
    ours, theirs = pair(torch.float64, torch.float64, dropout=0.3)
    x = torch.randn(4, 24, dtype=torch.float64)

    def again(layer, x):
        return checkpoint(layer, x, use_reentrant=False)

    results = []
    for layer, call in ((ours, None), (theirs, None), (ours, again)):
        layer.zero_grad()
        torch.manual_seed(11)
        results.append([part.clone() for part in outputs_and_gradients(layer, x, call)])
    for mine, other, recomputed in zip(*results):
        assert relative(mine, other) < 1e-13
        assert torch.equal(mine, recomputed)
    ours.eval()
    assert relative(ours(x).detach(), theirs.eval()(x).detach()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base_under_float32_masters(dtype):
    """No worse against float64 than PEFT's float32 path, up to the rounding of the dtype."""
    ours, theirs = pair(dtype, torch.float32)
    exact, _ = pair(torch.float64, torch.float64)
    exact.base_layer.weight.data = ours.base_layer.weight.double()
    exact.base_layer.bias.data = ours.base_layer.bias.double()
    x = torch.randn(64, 24).to(dtype)
    truth = outputs_and_gradients(exact, x.double())
    mine, other = outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x)
    assert [part.dtype for part in mine] == [part.dtype for part in other]
    assert mine[2].dtype == torch.float32
    for a, b, t in zip(mine, other, truth):
        assert relative(a, t) < max(2 * relative(b, t), 6 * torch.finfo(dtype).eps)


def test_autocast_over_a_float32_base():
    ours, theirs = pair(torch.float32, torch.float32)
    x = torch.randn(16, 24)

    def call(layer, x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    mine, other = outputs_and_gradients(ours, x, call), outputs_and_gradients(theirs, x, call)
    assert mine[0].dtype == other[0].dtype == torch.bfloat16
    assert mine[1].dtype == torch.float32
    for a, b in zip(mine, other):
        assert relative(a, b) < 0.03


@pytest.mark.parametrize("kind", [LoraLinear, DoraLinear])
def test_strength(kind):
    ours, _ = pair(torch.float32, torch.float32)
    if kind is DoraLinear:
        ours = DoraLinear(ours.base_layer, ours.down.detach(), ours.up.detach(), 7 / 4)
        ours.magnitude.data.mul_(1.5)
    x = torch.randn(6, 24)
    base = ours.base_layer(x)
    full = ours(x).detach() - base
    ours.strength = 0.0
    assert torch.equal(ours(x), base)
    for strength in (0.5, -1.0, 2.0):
        ours.strength = strength
        assert relative(ours(x).detach() - base, strength * full) < 1e-5


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Distinct storages that autograd keeps, the layer's own parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keeps_x_and_the_projection_only(dtype):
    ours, theirs = pair(dtype, torch.float32)
    x = torch.randn(8, 24, dtype=dtype, requires_grad=True)
    expected = (8 * 24 + 8 * 4) * dtype.itemsize
    assert saved_bytes(ours, x) == expected
    assert saved_bytes(theirs, x) >= expected
    if dtype == torch.bfloat16:
        assert saved_bytes(theirs, x) > 1.9 * expected
    assert math.isclose(ours.scale, 7 / 4)


def test_a_dora_that_starts_is_the_base_under_autocast_too() -> None:
    """Its rows' lengths are not rounded to bf16, which would stretch them by up to 0.4 %."""
    torch.manual_seed(0)
    base = nn.Linear(256, 64, bias=False)
    fresh = DoraLinear(base, torch.randn(4, 256), torch.zeros(64, 4))
    x = torch.randn(5, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fresh(x), base(x))


def round_to_tf32(tensor: Tensor) -> Tensor:
    """Keep 10 bits of the fraction of a float32, as TF32 products read their inputs."""
    bits = tensor.detach().contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & -(1 << 13)).view(torch.float32)


def test_a_first_step_from_principal_components_survives_tf32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The delta is a small difference of large products."""
    torch.manual_seed(0)
    base = nn.Linear(64, 64).requires_grad_(False)
    layer = LoraLinear(base, torch.randn(4, 64), torch.randn(64, 4), principal=True)
    with torch.no_grad():
        for factor in (layer.down, layer.up):
            factor.add_(1e-4 * torch.randn_like(factor).sign())
    x = torch.randn(8, 64)
    down, up, first_down, first_up = (
        part.detach().double()
        for part in (layer.down, layer.up, layer.initial_down, layer.initial_up)
    )
    exact = x.double() @ (up @ down - first_up @ first_down).t()
    product = F.linear
    monkeypatch.setattr(
        "simpletuner.adapters.adapted_linear.F.linear",
        lambda a, b: product(round_to_tf32(a), round_to_tf32(b)),
    )
    assert relative(layer._forward_from_initial(torch.zeros(8, 64), x, layer.initial_down,
                                                layer.initial_up), exact) < 5e-3  # fmt: skip


@pytest.mark.parametrize("by_column", [False, True])
def test_the_norms_of_a_dora_are_those_of_the_adapted_weight(by_column: bool) -> None:
    """Without the adapted weight: more rows than are cast at once, and a bf16 base."""
    torch.manual_seed(0)
    base = nn.Linear(48, 2500).bfloat16().requires_grad_(False)
    given = torch.ones(1, 48) if by_column else None
    layer = DoraLinear(base, torch.randn(4, 48), 0.1 * torch.randn(2500, 4), 1.7, row_norms=given)
    adapted = base.weight.double() + 1.7 * layer.up.double() @ layer.down.double()
    expected = torch.linalg.vector_norm(adapted, dim=0 if by_column else 1, keepdim=by_column)
    assert relative(layer.adapted_norms(), expected) < 1e-6


def test_a_dora_never_casts_its_whole_base() -> None:
    base = nn.Linear(64, 4096).bfloat16().requires_grad_(False)
    layer = DoraLinear(base, torch.randn(4, 64), torch.zeros(4096, 4), dropout=0.1)
    x = torch.randn(2, 64).bfloat16()
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32 and not func.is_view:
                largest = max(largest, out.numel())
            return out

    with Sizes():
        layer(x).float().sum().backward()
    assert largest < 64 * 4096
