from __future__ import annotations

import copy
import json

import pytest
import torch
from benchmarks.optimizers import peak_bytes
from torch import Tensor, nn

from simpletuner.config.optimizer_names import STOCHASTIC_OPTIMIZERS
from simpletuner.config.schema import OptimizerOptions
from simpletuner.errors import ConfigError
from simpletuner.training import flat_parameters, gradient_sum, optimizers
from simpletuner.training.checkpoint import flatten_optimizer, unflatten_optimizer
from simpletuner.training.eight_bit_moments import (
    EightBitMoments,
    dequantize_moments,
    mean_codes,
    quantize_moments,
    square_codes,
)
from simpletuner.training.muon import Muon
from simpletuner.training.optimizer_step import CPU_NORM_PART, clip_gradients
from simpletuner.training.optimizers import OPTIMIZERS, build_optimizer, set_optimizer_mode
from simpletuner.training.stochastic_adamw import CHUNK_SIZE, SameDtypeMoments, StochasticAdamW

SHAPES = {"down": (4, 9), "up": (7, 4), "bias": (7,)}
RATES = {"prodigy": 1.0}


def fresh(name: str, dtype: torch.dtype, config: str | None = None):
    generator = torch.Generator().manual_seed(0)
    params = [
        (key, nn.Parameter((torch.randn(shape, generator=generator) * (key != "up")).to(dtype)))
        for key, shape in SHAPES.items()
    ]
    options = OptimizerOptions(
        optimizer=name, learning_rate=RATES.get(name, 0.01), optimizer_config=config
    )
    return params, build_optimizer(options, params, seed=3)


def step(params, optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * (0.97 if number % 2 else 1.02)
    for _, param in params:
        noise = 0.3 * torch.randn(param.shape, generator=generator)
        param.grad = (param.detach().float() + noise).to(param.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def same(mine: object, other: object) -> bool:
    if isinstance(mine, Tensor):
        return isinstance(other, Tensor) and mine.dtype == other.dtype and torch.equal(mine, other)
    if isinstance(mine, dict):
        return mine.keys() == other.keys() and all(same(mine[key], other[key]) for key in mine)
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(other) and all(map(same, mine, other))
    return mine == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("looks_before_saving", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_and_resumed_is_uninterrupted_bit_for_bit(name, looks_before_saving, dtype):
    params, optimizer = fresh(name, dtype)
    for number in range(8):
        step(params, optimizer, number)
    through, first = fresh(name, dtype)
    for number in range(5):
        step(through, first, number)
    if looks_before_saving:
        set_optimizer_mode(first, training=False)
    tensors, rest = flatten_optimizer(first.state_dict())
    saved = {key: param.detach().clone() for key, param in through}
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    resumed, second = fresh(name, dtype)
    with torch.no_grad():
        for key, param in resumed:
            param.copy_(saved[key])
    second.load_state_dict(
        unflatten_optimizer(tensors, json.loads(json.dumps(rest)), second.state_dict())
    )
    for number in range(5, 8):
        step(resumed, second, number)
    for (_, mine), (_, other) in zip(resumed, params):
        assert torch.equal(mine, other)
    assert same(second.state_dict(), optimizer.state_dict())
    # the same from cold is another course, or this test proves nothing
    cold, third = fresh(name, dtype)
    with torch.no_grad():
        for key, param in cold:
            param.copy_(saved[key])
    for number in range(5, 8):
        step(cold, third, number)
    assert not all(torch.equal(mine, other) for (_, mine), (_, other) in zip(cold, params))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_descends(name):
    params, optimizer = fresh(name, torch.float32)
    goal = [torch.full_like(param, 0.5) for _, param in params]
    for group in optimizer.param_groups:
        group["lr"] = RATES.get(name, 0.05)

    def loss() -> Tensor:
        return sum((param - at).square().sum() for (_, param), at in zip(params, goal))

    before = loss().item()
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    set_optimizer_mode(optimizer, training=False)
    assert loss().item() < 0.2 * before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_looking_changes_nothing(name):
    params, optimizer = fresh(name, torch.float32)
    watched, other = fresh(name, torch.float32)
    for number in range(6):
        step(params, optimizer, number)
        step(watched, other, number)
        before = [param.detach().clone() for _, param in watched]
        set_optimizer_mode(other, training=False)
        set_optimizer_mode(other, training=False)
        shown = [param.detach().clone() for _, param in watched]
        set_optimizer_mode(other, training=True)
        set_optimizer_mode(other, training=True)
        if number:
            assert all(map(torch.equal, before, shown)) == (name != "adamw_schedulefree")
    assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(params, watched))
    assert same(optimizer.state_dict(), other.state_dict())


def test_schedule_free_shows_the_average_of_its_own_points():
    """x_{t+1} = (1 - c) x_t + c z_{t+1}, with c = 1 / t at a constant rate: the plain mean of z."""
    params, optimizer = fresh("adamw_schedulefree", torch.float32)
    points = []
    for number in range(6):
        for _, param in params:
            param.grad = torch.sin(param.detach() * (number + 1))
        optimizer.step()
        points.append([optimizer.state[param]["z"].clone() for _, param in params])
    set_optimizer_mode(optimizer, training=False)
    for (_, param), *zs in zip(params, *points):
        assert torch.allclose(param, torch.stack(zs).mean(0), atol=1e-5)


def test_muon_is_torchs_on_matrices_and_adamw_on_the_rest():
    params, optimizer = fresh("muon", torch.float32)
    others, _ = fresh("muon", torch.float32)
    matrices, rest = (
        [param for _, param in others if (param.ndim == 2) == wanted] for wanted in (True, False)
    )
    oracles = (
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.01),
    )
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        for (_, mine), (_, other) in zip(params, others):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for each in (optimizer, *oracles):
            each.step()
    for (name, mine), (_, other) in zip(params, others):
        assert torch.allclose(mine, other, atol=2e-6), name


def test_muon_refuses_what_it_cannot_do():
    for config, word in (
        ("momentum=1.0", "momentum"),
        ("iterations=0", "iterations"),
        ("beta=1", "beta"),
    ):
        with pytest.raises(ConfigError, match=word):
            fresh("muon", torch.float32, config)


def test_stochastic_adamw_on_float32_is_adamw():
    params, optimizer = fresh("adamw_bf16", torch.float32)
    others, reference = fresh("adamw", torch.float32)
    for number in range(20):
        step(params, optimizer, number)
        step(others, reference, number)
    for (_, mine), (_, other) in zip(params, others):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_updates_below_the_last_bit_accumulate():
    """200 updates of 1/2560 each: nearest rounding would leave the weight at 1."""
    param = nn.Parameter(torch.ones(512, 8, dtype=torch.bfloat16))
    optimizer = StochasticAdamW(
        [param], 1 / 2560, (0.9, 0.999), 1e-8, 0.0, seed=1, moments=SameDtypeMoments()
    )
    for _ in range(200):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert float(param.detach().float().mean()) == pytest.approx(1 - 200 / 2560, rel=2e-3)
    moments = optimizer.state[param]
    assert {moments[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    # the second moment of a gradient of 1 is 1 - 0.999^200; nearest rounding would stall it
    assert float(moments["exp_avg_sq"].float().mean()) == pytest.approx(1 - 0.999**200, rel=0.01)


def test_muon_in_bf16_accumulates_updates_below_the_last_bit():
    """A constant gradient moves every weight of a matrix of rank 1 alike: 0.2 * lr * sqrt(64) / 64
    a step.
    """
    param = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    bias = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = Muon(
        [param, bias], lr=1 / 256, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, seed=1
    )
    for _ in range(100):
        param.grad, bias.grad = torch.ones_like(param), torch.ones_like(bias)
        optimizer.step()
    matrix, rest = (float(1 - each.detach().float().mean()) for each in (param, bias))
    assert 0.65 < matrix / (100 * 0.2 / 256 / 8) < 1.2
    assert rest == pytest.approx(100 / 256, rel=0.02)
    assert {tensor.dtype for state in optimizer.state.values() for tensor in state.values()} == {
        torch.bfloat16
    }


def test_large_weights_are_stepped_in_chunks():
    """Beyond one chunk each draws its own noise; float32 needs none, and is AdamW's in every chunk."""
    torch.manual_seed(0)
    start = torch.randn(CHUNK_SIZE + 300)
    mine, other, small = (
        nn.Parameter(start.clone()),
        nn.Parameter(start.clone()),
        nn.Parameter(start.bfloat16()),
    )
    arguments = (0.1, (0.9, 0.999), 1e-8, 0.01, 1, SameDtypeMoments())
    optimizers_ = (
        StochasticAdamW([mine], *arguments),
        torch.optim.AdamW([other], 0.1, weight_decay=0.01),
    )
    rounding = StochasticAdamW([small], *arguments)
    gradient = torch.randn_like(start)
    mine.grad = other.grad = gradient
    small.grad = gradient.bfloat16()
    for each in (*optimizers_, rounding):
        each.step()
    assert torch.allclose(mine, other, atol=1e-6)
    assert torch.allclose(small.float(), other, atol=0.05)


@pytest.mark.parametrize("table", [mean_codes(), square_codes()], ids=["mean", "square"])
def test_eight_bits_keep_a_neighbour_and_the_average(table):
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(8, 256, generator=generator) * 10.0 ** torch.arange(-6.0, 2.0)[:, None]
    exact = exact if table[0] < 0 else exact.square()
    assert (table.diff() > 0).all()
    assert len(table) <= 256

    def uniform() -> Tensor:
        return torch.rand(exact.shape, generator=generator)

    reads = torch.stack(
        [dequantize_moments(*quantize_moments(exact, table, uniform), table) for _ in range(400)]
    ).double()
    scale = exact.abs().amax(1, keepdim=True)
    share = (exact / scale).clamp(min=float(table[0])).contiguous()
    above = torch.searchsorted(table, share).clamp(1, len(table) - 1)
    gap = (table[above] - table[above - 1]) * scale
    assert ((reads - exact).abs() <= 1.001 * gap + table[0].clamp(min=0) * scale).all()
    assert ((reads.mean(0) - exact).abs() <= 0.15 * gap + table[0].clamp(min=0) * scale).all()
    largest = exact.abs() == scale
    assert torch.allclose(reads[:, largest], exact[largest].double())


def test_eight_bits_keep_what_never_had_a_gradient_and_never_lose_the_square():
    optimizer = StochasticAdamW(
        [param := nn.Parameter(torch.ones(300))],
        0.1,
        (0.9, 0.999),
        1e-8,
        0.0,
        seed=0,
        moments=EightBitMoments(),
    )
    for number in range(30):
        param.grad = torch.zeros(300)
        param.grad[:100] = 1.0 + number % 3
        param.grad[100:200] = 1e-9 * (
            number == 3
        )  # nearly always without, and far below the others
        optimizer.step()
    assert (param[200:] == 1).all()
    assert ((param[100:200] - 1).abs() < 0.1 * 3).all()
    assert (param[:100] < -1).all()
    state = optimizer.state[param]
    mean, square = EightBitMoments().read(state, slice(0, 300))
    assert (mean[200:] == 0).all()
    assert float(square[:100].mean()) == pytest.approx(14 / 3 * (1 - 0.999**30), rel=0.05)
    assert sum(tensor.nbytes for tensor in state.values()) == 2 * (512 + 2 * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_learn_as_adamw_does(dtype):
    """A noisy least-squares problem, badly scaled; 300 steps; the loss of float32 states is the
    oracle.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(512, 40, generator=generator) * torch.logspace(-1, 0.5, 40)
    goal = torch.randn(40, 30, generator=generator)

    def loss_of(name: str) -> float:
        param = nn.Parameter(torch.zeros(40, 30, dtype=dtype))
        options = OptimizerOptions(optimizer=name, learning_rate=0.02)
        optimizer = build_optimizer(options, [("weight", param)], seed=5)
        draws = torch.Generator().manual_seed(2)
        for _ in range(300):
            rows = torch.randint(0, 512, (32,), generator=draws)
            noise = torch.randn(32, 30, generator=draws)
            (inputs[rows] @ (param.float() - goal) + noise).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return float((inputs @ (param.detach().float() - goal)).square().mean())

    begun = float((inputs @ goal).square().mean())
    exact, small = (
        loss_of("adamw" if dtype == torch.float32 else "adamw_bf16"),
        loss_of("adamw_8bit"),
    )
    assert exact < 0.01 * begun
    assert small < 1.15 * exact


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_makes_no_copy_of_all_weights(name, monkeypatch):
    """16 matrices of 256 KiB in buckets of one; what a step needs beside states and gradients is a
    few of one of them.
    """
    monkeypatch.setattr(gradient_sum, "BUCKET_BYTES", 256 * 256 * 4)
    monkeypatch.setattr(flat_parameters, "GROUP_NUMBERS", 256 * 256)
    params = [(str(number), nn.Parameter(torch.randn(256, 256))) for number in range(16)]
    optimizer = build_optimizer(OptimizerOptions(optimizer=name), params, seed=0)
    for _ in range(2):
        for _, param in params:
            param.grad = torch.ones_like(param)
        extra = peak_bytes(optimizer.step)
    one = 256 * 256 * 4
    assert extra <= {"adamw": 0.1, "adamw_8bit": 15, "adamw_bf16": 8}.get(name, 5) * one


@pytest.mark.parametrize("method", ["norm", "value"])
def test_clipping_makes_no_copy(method):
    params = [nn.Parameter(torch.zeros(1024, 1024, dtype=torch.bfloat16)) for _ in range(4)]
    for param in params:
        param.grad = torch.ones_like(param)
    options = OptimizerOptions(max_grad_norm=0.5, grad_clip_method=method)
    one = 1024 * 1024 * 4  # one gradient in float32
    assert peak_bytes(lambda: clip_gradients(params, options)) < 1.1 * one


def test_the_norm_of_a_long_gradient_has_all_of_its_parts():
    param = nn.Parameter(torch.zeros(2 * CPU_NORM_PART + 7))
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    expected = float(param.grad.double().square().sum().sqrt())
    assert clip_gradients([param], OptimizerOptions()) == pytest.approx(expected, rel=1e-6)


def test_the_norm_of_bf16_gradients_is_exact():
    params = [nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones_like(param)
    assert clip_gradients(params, OptimizerOptions()) == pytest.approx(3000**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "config", "key", "value"),
    [
        ("prodigy", "d_coef=2.0, safeguard_warmup=true", "d_coef", 2.0),
        ("adafactor", "d=1.5,eps2=0.01", "eps", (None, 0.01)),
        ("adamw_schedulefree", "r=1.0", "r", 1.0),
        ("lion", "beta2=0.98", "beta2", 0.98),
        ("adamw", "amsgrad=True", "amsgrad", True),
    ],
)
def test_optimizer_config_reaches_the_optimizer(name, config, key, value):
    _, optimizer = fresh(name, torch.float32, config)
    assert optimizer.param_groups[0][key] == value


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        (
            "prodigy",
            "dcoef=2",
            "'dcoef=2' is not an argument of prodigy; it takes beta3=..., d0=..., d_coef=",
        ),
        ("adamw_bf16", "r=1", "it takes no further arguments"),
        ("adamw", "amsgrad", "'amsgrad' is not an argument"),
        ("adamw", "amsgrad=maybe", "'maybe' is not true or false"),
        ("prodigy", "slice_p=1.5", "'1.5' is not a number"),
        ("adafactor", "d=0.5", "Clipping threshold"),
        ("lion", "beta1=2", "beta1"),
    ],
)
def test_optimizer_config_refusals(name, config, told):
    with pytest.raises(ConfigError) as refused:
        fresh(name, torch.float32, config)
    assert told in str(refused.value)


def test_options_reach_the_adam_family():
    options = {
        "learning_rate": 0.5,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_weight_decay": 0.2,
        "adam_epsilon": 1e-6,
    }
    for name in ("adamw", "adamw_bf16", "adamw_8bit", "prodigy", "adamw_schedulefree", "muon"):
        group = build_optimizer(
            OptimizerOptions(optimizer=name, **options), fresh(name, torch.float32)[0], 0
        ).param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (
            0.5,
            (0.8, 0.9),
            0.2,
            1e-6,
        )


def test_prodigy_is_silent(capsys):
    fresh("prodigy", torch.float32)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("method", ["norm", "value"])
@pytest.mark.parametrize("limit", [0.0, 1.0, 1000.0])
def test_clipping(method, limit):
    params = [
        nn.Parameter(torch.zeros(3)),
        nn.Parameter(torch.zeros(2, 2)),
        nn.Parameter(torch.zeros(5)),
    ]
    params[0].grad = torch.tensor([3.0, -4.0, 0.0])
    params[1].grad = torch.tensor([[12.0, 0.0], [0.0, 0.5]])
    before = [copy.deepcopy(param.grad) for param in params[:2]]
    norm = clip_gradients(params, OptimizerOptions(max_grad_norm=limit, grad_clip_method=method))
    assert norm == pytest.approx((9 + 16 + 144 + 0.25) ** 0.5)
    for param, old in zip(params, before):
        if limit != 1.0:
            assert torch.equal(param.grad, old)
        elif method == "value":
            assert torch.equal(param.grad, old.clamp(-1, 1))
        else:
            assert torch.allclose(param.grad, old / norm, rtol=1e-5)


def test_clipping_tells_of_numbers_that_are_not_finite():
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([1.0, float("nan")])
    assert clip_gradients([param], OptimizerOptions()) != clip_gradients(
        [param], OptimizerOptions()
    )
    param.grad = torch.tensor([1.0, float("inf")])
    assert clip_gradients([param], OptimizerOptions()) == float("inf")


def test_table_covers_the_option():
    assert set(optimizers.OPTIMIZERS) == set(
        OptimizerOptions.model_fields["optimizer"].annotation.__args__
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_who_rounds_bf16_weights_stochastically(name):
    """An update of a hundredth of the spacing moves a few weights by one step, or none."""
    param = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    options = OptimizerOptions(optimizer=name, learning_rate=4e-5, adam_weight_decay=0.0)
    optimizer = build_optimizer(options, [("weight", param)], seed=1)
    param.grad = torch.ones_like(param)
    optimizer.step()
    moved = int((param.detach() != 1).sum())
    assert (0 < moved < param.numel() // 4) == (name in STOCHASTIC_OPTIMIZERS), moved
