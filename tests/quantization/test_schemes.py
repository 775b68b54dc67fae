"""What a scheme keeps, and how far the restored weight is from the real one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simpletuner.errors import ConfigError
from simpletuner.quantization import schemes
from simpletuner.quantization.schemes import SCHEMES, get_scheme

# Root of the mean square error over that of the weights, Gaussian rows with a few outliers.
ERRORS = {"int8": 0.0095, "fp8": 0.027, "int4": 0.093, "nf4": 0.094}
BYTES_PER_WEIGHT = {"int8": 1.001, "fp8": 1.001, "int4": 0.5625, "nf4": 0.5314}

# The table of bitsandbytes (csrc, `nf4_dequantization_lut`), typed from there and not from our
# module.
BITSANDBYTES_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight *= 0.5 + torch.rand(rows, 1, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 1e-4] *= 8
    return weight.to(dtype)


def restored(name: str, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    scheme = SCHEMES[name]
    return scheme.dequantize(scheme.quantize(weight), weight.shape[1], dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("columns", [256, 200, 3])
def test_parts_are_what_the_plan_was_told(name: str, columns: int) -> None:
    parts = SCHEMES[name].quantize(gaussian(24, columns))
    assert {key: (tuple(part.shape), part.dtype) for key, part in parts.items()} == dict(
        SCHEMES[name].buffer_shapes(24, columns)
    )
    assert list(parts) == list(SCHEMES[name].buffer_shapes(24, columns))
    assert SCHEMES[name].size_bytes(24, columns) == sum(part.nbytes for part in parts.values())


@pytest.mark.parametrize("name", SCHEMES)
def test_error_and_size_are_as_stated(name: str) -> None:
    weight = gaussian(512, 1024)
    assert 0.8 * ERRORS[name] < relative(restored(name, weight), weight) < ERRORS[name]
    assert SCHEMES[name].size_bytes(3072, 3072) / 3072**2 == pytest.approx(
        BYTES_PER_WEIGHT[name], rel=1e-3
    )


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("columns", [200, 3, 65])
def test_widths_that_fill_no_group(name: str, columns: int) -> None:
    weight = gaussian(64, columns)
    found = restored(name, weight)
    assert found.shape == weight.shape
    assert relative(found, weight) < 1.1 * ERRORS[name]


@pytest.mark.parametrize("name", SCHEMES)
def test_rounded_once_whatever_the_dtype(name: str) -> None:
    weight = gaussian(64, 256, torch.float32)
    wide = restored(name, weight)
    assert torch.equal(wide.bfloat16(), restored(name, weight, torch.bfloat16))
    assert torch.equal(wide.half(), restored(name, weight, torch.float16))


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_are_independent(name: str) -> None:
    weight = gaussian(40, 192)
    whole, some = SCHEMES[name].quantize(weight), SCHEMES[name].quantize(weight[8:24])
    for key, (shape, _) in SCHEMES[name].buffer_shapes(40, 192).items():
        expected = whole[key][8:24] if shape[0] == 40 else whole[key]
        assert torch.equal(expected.view(torch.uint8), some[key].view(torch.uint8)), key


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(SCHEMES)),
    values=st.lists(
        st.one_of(
            st.just(0.0),
            st.floats(-(2.0**10), 2.0**10, width=16),
            st.floats(-(2.0**-100), 2.0**-100, width=32),
        ),
        min_size=1,
        max_size=70,
    ),
)
def test_nothing_breaks_it(name: str, values: list[float]) -> None:
    """Zeros, constants, one sign only, tiny numbers: finite, never farther off than a step of the
    row.
    """
    weight = torch.tensor([values])
    found = restored(name, weight)
    assert torch.isfinite(found).all()
    step = {"int8": 1 / 250, "fp8": 1 / 27, "int4": 0.072, "nf4": 0.16}[name]
    span = float(weight.abs().max()) * (2 if name == "int4" else 1)
    assert float((found - weight).abs().max()) <= step * span + 1e-38


def test_zeros_stay_zeros() -> None:
    for name in SCHEMES:
        assert not restored(name, torch.zeros(2, 130)).any()


def test_nf4_codes_and_absmax_are_those_of_bitsandbytes() -> None:
    """Its algorithm spelled out: blocks of 64 in memory order, nearest level of x / absmax, two a
    byte.
    """
    weight = gaussian(48, 320)
    blocks = weight.float().reshape(-1, 64)
    absmax = blocks.abs().max(dim=1).values
    distance = (blocks / absmax[:, None])[..., None] - torch.tensor(BITSANDBYTES_NF4)
    nearest = distance.abs().argmin(-1).flatten()
    packed = (nearest[::2] * 16 + nearest[1::2]).to(torch.uint8)
    parts = SCHEMES["nf4"].quantize(weight)
    assert torch.equal(parts["codes"].flatten(), packed)
    assert torch.equal(parts["absmax"].flatten().float(), absmax)


def test_nf4_against_bitsandbytes_itself() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = gaussian(48, 320)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    parts = SCHEMES["nf4"].quantize(weight)
    assert torch.equal(parts["codes"].flatten(), packed.flatten())
    assert torch.equal(parts["absmax"].flatten().float(), state.absmax)


def test_an_unknown_scheme_is_told_the_names() -> None:
    with pytest.raises(ConfigError, match="int8, fp8, int4, nf4"):
        get_scheme("int3")


@pytest.mark.parametrize("columns", [200, 256])
def test_nf4_in_pieces_is_the_same_weight(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(23, columns)
    whole = restored("nf4", weight, torch.bfloat16)
    monkeypatch.setattr(schemes, "NF4_CHUNK_CODES", 5 * 128)
    assert torch.equal(restored("nf4", weight, torch.bfloat16), whole)
