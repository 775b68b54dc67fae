from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simpletuner.cache import text_cache
from simpletuner.cache.batch_loader import BatchLoader
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.data.sample_types import BucketedSample, MicroBatchPlan, SampleVisit

SHIFT, SCALE = 0.25, 3.0


def moments(number: int) -> Tensor:
    return torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(number))


def encode(
    batches: Sequence[Sequence[str]], advance: Callable[[int], None]
) -> Iterator[list[dict[str, Tensor]]]:
    for captions in batches:
        yield embeddings_of(captions)


def embeddings_of(captions: Sequence[str]) -> list[dict[str, Tensor]]:
    return [
        {
            "rows": torch.full((len(one) + 1, 4), 1.0 + len(one), dtype=torch.bfloat16),
            "pooled": torch.full((3,), float(len(one))),
        }
        for one in captions
    ]


Make = Callable[..., BatchLoader]


@pytest.fixture
def make(
    tmp_path: Path, make_placed_samples: Callable[[int], list[BucketedSample]]
) -> Iterator[Make]:
    placed = make_placed_samples(12)
    keys = [f"key{number}" for number in range(12)]
    with (
        TensorStore(tmp_path / "l", "v", shard_mib=0.002) as latents,
        TensorStore(tmp_path / "t", "t5") as rows,
    ):
        for number, key in enumerate(keys):
            latents.put(key, {"moments": moments(number)})
        latents.flush()
        text_cache.encode_missing_captions(
            rows, [one.sample.captions[0] for one in placed], lambda: encode, lambda event: None
        )
        yield lambda sample="draw", seed=1, channels=3: BatchLoader(
            placed, keys, latents, rows, SHIFT, SCALE, sample, seed, channels
        )


def micro(number: int, epoch: int = 0, pass_: int = 0) -> MicroBatchPlan:
    first, second = number % 12, (number * 5 + 1) % 12
    return MicroBatchPlan(
        number,
        epoch,
        (SampleVisit(first, epoch, pass_, 0), SampleVisit(second, epoch, pass_, None)),
    )


def test_the_mean_is_scaled_for_the_network(make: Make) -> None:
    batch = make("mean").load(micro(10))
    assert batch.latents.shape == (2, 3, 8, 8)
    assert batch.latents.dtype == torch.float32
    assert torch.equal(batch.latents[0], (moments(10)[:3] - SHIFT) * SCALE)
    assert batch.sample_ids == ("d/10.png", "d/3.png")
    assert batch.visit_keys == ("d/10.png@0.0", "d/3.png@0.0")


def test_moments_without_variance_are_latents(make: Make) -> None:
    for sample in ("mean", "draw"):
        batch = make(sample, channels=6).load(micro(10))
        assert torch.equal(batch.latents[0], (moments(10) - SHIFT) * SCALE)


def test_a_dropped_caption_is_the_empty_one_and_rows_are_padded(make: Make) -> None:
    batch = make("mean").load(micro(10))
    assert batch.text.lengths == {"rows": (4, 1)}  # "c10" and ""
    assert batch.text.tensors["rows"].dtype == torch.bfloat16
    assert torch.equal(batch.text.tensors["rows"][0].float(), torch.full((4, 4), 4.0))
    assert torch.equal(
        batch.text.tensors["rows"][1].float(), torch.tensor([1.0, 0, 0, 0])[:, None].expand(4, 4)
    )
    assert not batch.text.has_equal_lengths("rows")
    assert batch.text.tensors["pooled"].tolist() == [[3.0] * 3, [0.0] * 3]  # no length axis
    moved = batch.text.to("cpu", torch.float32)
    assert {tensor.dtype for tensor in moved.tensors.values()} == {torch.float32}


def test_a_draw_is_a_function_of_the_visit_alone(make: Make) -> None:
    work = [micro(number, number // 30, number % 3) for number in range(90)]
    in_order = {one.index: make().load(one).latents for one in work}
    shuffled = random.Random(0).sample(work, len(work))
    batches = make()
    with ThreadPoolExecutor(6) as pool:
        for one, batch in zip(shuffled, pool.map(batches.load, shuffled), strict=True):
            assert torch.equal(batch.latents, in_order[one.index])
    # Neither the place in the batch nor the batch's number matters.
    a, b = micro(0), MicroBatchPlan(7, 0, micro(0).visits[::-1])
    assert torch.equal(make().load(a).latents, make().load(b).latents.flip(0))


def test_draws_differ_between_visits_and_seeds(make: Make) -> None:
    batches = make()
    base = batches.load(micro(0)).latents
    later, repeated = batches.load(micro(0, epoch=1)), batches.load(micro(0, pass_=1))
    for other in (later, repeated, make(seed=2).load(micro(0))):
        assert float((other.latents - base).abs().mean()) > 0.1


def test_draws_have_the_posterior_s_mean_and_variance(make: Make) -> None:
    batches = make()
    visits = tuple(SampleVisit(4, epoch, 0, 0) for epoch in range(4000))
    drawn = batches.load(MicroBatchPlan(0, 0, visits)).latents / SCALE + SHIFT
    mean, log_variance = moments(4).chunk(2)
    deviation = torch.exp(log_variance / 2)
    assert float(((drawn.mean(0) - mean) / deviation).abs().max()) < 4.5 / 4000**0.5
    assert float((drawn.var(0) / deviation**2 - 1).abs().max()) < 4.5 * (2 / 4000) ** 0.5
