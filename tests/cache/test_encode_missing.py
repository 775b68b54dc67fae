from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from simpletuner.cache import latent_cache, text_cache
from simpletuner.cache.content_hashes import ContentHashes
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.config.schema import DataOptions
from simpletuner.data.pixels import load_pixels
from simpletuner.data.sample_types import BucketedSample
from simpletuner.data.sources import LocalFile
from simpletuner.errors import CacheError, DataError
from simpletuner.events.event_types import Event, StageCompleted, StageStarted

OPTIONS = DataOptions(max_bad_sample_fraction=0.5)


def never() -> Callable[[Tensor], Tensor]:
    raise AssertionError("the encoder was loaded although nothing is missing")


class Encoder:
    """Moments that tell which pixels came in; NaN for the pictures named."""

    def __init__(self, poison: Tensor | None = None) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.poison = poison
        self.loaded = 0

    def __call__(self) -> Callable[[Tensor], Tensor]:
        self.loaded += 1
        return self.encode

    def encode(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.float32
        self.shapes.append(tuple(pixels.shape))
        moments = torch.nn.functional.avg_pool2d(pixels, 8)
        if self.poison is not None:
            same = (pixels == self.poison).flatten(1).all(1)
            moments[same] = torch.inf
        return torch.cat([moments, -moments], 1)


def expected(placed: BucketedSample) -> Tensor:
    pixels = torch.from_numpy(load_pixels(placed, OPTIONS)).permute(2, 0, 1) / 127.5 - 1
    mean = torch.nn.functional.avg_pool2d(pixels[None], 8)[0]
    return torch.cat([mean, -mean])


def fill(
    folder: Path,
    placed: Sequence[BucketedSample],
    encoder: Callable[[], latent_cache.EncodeImages],
    **more: object,
) -> tuple[latent_cache.LatentCacheResult, list[Tensor], list[Event]]:
    seen: list[Event] = []
    hashes = ContentHashes(folder)
    options = OPTIONS.model_copy(update=more)
    with TensorStore(folder / "latents", "vae-1") as store:
        filled = latent_cache.encode_missing_latents(
            store, placed, options, hashes, encoder, seen.append, batch_size=2
        )
        found = [store.get(key)["moments"] for key in filled.latent_keys]
    hashes.close()
    return filled, found, seen


def test_moments_are_those_of_the_pictures_and_batches_keep_to_a_bucket(
    tmp_path: Path,
    make_placed_samples: Callable[[int], list[BucketedSample]],
    make_placed_sample: Callable[..., BucketedSample],
) -> None:
    placed = make_placed_samples(5)
    wide = [make_placed_sample(tmp_path / f"w{n}.png", 100 + n, (128, 64)) for n in range(3)]
    placed = [placed[0], wide[0], *placed[1:], *wide[1:]]
    encoder = Encoder()
    filled, found, seen = fill(tmp_path, placed, encoder)
    assert filled.placed_samples == tuple(placed)
    assert filled.rejected == ()
    assert encoder.loaded == 1
    for one, moments in zip(placed, found, strict=True):
        assert torch.allclose(moments, expected(one), atol=1e-6)
    square, wider = (3, 64, 64), (3, 64, 128)
    assert encoder.shapes == [(2, *square), (2, *square), (1, *square), (2, *wider), (1, *wider)]
    stages = [event.stage for event in seen if isinstance(event, StageStarted)]
    assert stages == ["hash", "encode images"]
    assert [event.done for event in seen if isinstance(event, StageCompleted)] == [8, 8]


def test_a_second_start_loads_and_reads_nothing(
    tmp_path: Path, make_placed_samples: Callable[[int], list[BucketedSample]]
) -> None:
    placed = make_placed_samples(4)
    first, moments, _ = fill(tmp_path, placed, Encoder())
    hashes = ContentHashes(tmp_path)
    with TensorStore(tmp_path / "latents", "vae-1") as store:
        second = latent_cache.encode_missing_latents(
            store, placed, OPTIONS, hashes, never, lambda event: None
        )
        again = [store.get(key)["moments"] for key in second.latent_keys]
        assert all(torch.equal(one, old) for one, old in zip(again, moments, strict=True))
    assert hashes.hashed_files == 0
    assert second == first


def test_what_changes_the_moments_changes_the_key(
    tmp_path: Path, make_placed_samples: Callable[[int], list[BucketedSample]]
) -> None:
    one = make_placed_samples(1)[0]
    key = latent_cache.latent_key
    base = key("c", one, OPTIONS, "v")
    others = {
        key("d", one, OPTIONS, "v"),
        key("c", one, OPTIONS, "w"),
        key("c", one, OPTIONS.model_copy(update={"alpha_background": "black"}), "v"),
        *(
            key("c", replace(one, **{name: (64, 1)}), OPTIONS, "v")
            for name in ("resize_px", "crop_px", "bucket_px")
        ),
    }
    assert len(others | {base}) == 7
    assert (
        key("c", replace(one, sample=replace(one.sample, id="x", captions=("y",))), OPTIONS, "v")
        == base
    )


def test_the_same_picture_twice_is_encoded_once(
    tmp_path: Path, make_placed_sample: Callable[..., BucketedSample]
) -> None:
    placed = [make_placed_sample(tmp_path / f"{name}.png", 1) for name in "abc"]
    encoder = Encoder()
    filled, _, _ = fill(tmp_path, placed, encoder)
    assert encoder.shapes == [(1, 3, 64, 64)]
    assert len(filled.placed_samples) == 3
    assert len(set(filled.latent_keys)) == 1


def test_bad_pictures_are_rejected_and_the_work_goes_on(
    tmp_path: Path, make_placed_samples: Callable[[int], list[BucketedSample]]
) -> None:
    placed = make_placed_samples(8)
    data = placed[1].sample.file.path.read_bytes()
    placed[1].sample.file.path.write_bytes(data[: len(data) // 2])
    placed[3].sample.file.path.unlink()
    poison = torch.from_numpy(load_pixels(placed[5], OPTIONS)).permute(2, 0, 1) / 127.5 - 1
    encoder = Encoder(poison)
    filled, found, _ = fill(tmp_path, placed, encoder)
    good = [placed[number] for number in (0, 2, 4, 6, 7)]
    assert filled.placed_samples == tuple(good)
    assert all(
        torch.allclose(m, expected(one), atol=1e-6) for m, one in zip(found, good, strict=True)
    )
    assert {(Path(bad.path).name, bad.reason) for bad in filled.rejected} == {
        ("1.png", "damaged"), ("3.png", "unreadable"), ("5.png", "nonfinite_latent"),
    }  # fmt: skip
    with pytest.raises(DataError, match=r"3 of 8 images.*max_bad_sample_fraction = 0\.1"):
        fill(tmp_path, placed, encoder, max_bad_sample_fraction=0.1)


def test_an_image_of_which_one_crop_fails_is_not_used(
    tmp_path: Path, make_placed_sample: Callable[..., BucketedSample]
) -> None:
    good, bad = (make_placed_sample(tmp_path / f"{name}.png", 1) for name in "ab")
    placed = [
        good,
        replace(good, crop_index=1),
        bad,
        replace(bad, crop_px=(8, 8), resize_px=(80, 80), crop_index=1),
    ]
    poison = torch.from_numpy(load_pixels(placed[3], OPTIONS)).permute(2, 0, 1) / 127.5 - 1
    filled, _, _ = fill(tmp_path, placed, Encoder(poison))
    assert filled.placed_samples == tuple(placed[:2])
    assert [Path(rejected.path).name for rejected in filled.rejected] == ["b.png"]
    with pytest.raises(DataError, match=r"1 of 2 images"):
        fill(tmp_path, placed, Encoder(poison), max_bad_sample_fraction=0.4)


def test_a_picture_that_cannot_be_decoded_does_not_load_the_encoder(
    tmp_path: Path, make_placed_sample: Callable[..., BucketedSample]
) -> None:
    good, bad = (
        make_placed_sample(tmp_path / "good.png", 1),
        make_placed_sample(tmp_path / "bad.png", 2),
    )
    bad.sample.file.path.write_bytes(bad.sample.file.path.read_bytes()[:-40])
    fill(tmp_path, [good, bad], Encoder())
    filled, _, _ = fill(tmp_path, [good, bad], never)
    assert [one.reason for one in filled.rejected] == ["damaged"]


def test_content_hashes_follow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    hashes = ContentHashes(tmp_path)
    first = hashes.hash_file(LocalFile(path))
    assert hashes.hash_file(LocalFile(path)) == first
    assert hashes.hashed_files == 1
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"two")  # the same size
    os.utime(path, ns=(stamp + 1, stamp + 1))
    assert hashes.hash_file(LocalFile(path)) != first
    hashes.close()
    (tmp_path / "content.sqlite").write_bytes(os.urandom(5000))
    seen: list[Event] = []
    again = ContentHashes(tmp_path, seen.append)
    path.write_bytes(b"one")
    assert again.hash_file(LocalFile(path)) == first
    assert len(seen) == 1


def in_batches(encode: Callable[[Sequence[str]], list[dict[str, Tensor]]]) -> text_cache.EncodeText:
    def encode_batches(
        batches: Sequence[Sequence[str]], advance: Callable[[int], None]
    ) -> Iterator[list[dict[str, Tensor]]]:
        for captions in batches:
            yield encode(captions)
            advance(len(captions))

    return encode_batches


class Text:
    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self) -> text_cache.EncodeText:
        return in_batches(self.encode)

    def encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        self.batches.append(list(captions))
        return [
            {"rows": torch.full((len(one) + 1, 4), 1.0, dtype=torch.bfloat16)} for one in captions
        ]


def test_captions_are_encoded_once_in_batches_of_like_length(tmp_path: Path) -> None:
    encoder = Text()
    captions = ["a long caption", "é", "a long caption", "bb", "another caption", "\udcff"]
    with TensorStore(tmp_path, "t5") as store:
        text_cache.encode_missing_captions(
            store, captions, encoder, lambda event: None, batch_size=2
        )
        for caption in (*captions, ""):
            rows = store.get(text_cache.text_key(caption, "t5"))["rows"]
            assert rows.dtype == torch.bfloat16
            assert rows.shape == (len(caption) + 1, 4)
    lengths = [[len(caption) for caption in batch] for batch in encoder.batches]
    assert lengths == [[0, 1], [1, 2], [14, 15]]
    with TensorStore(tmp_path, "t5") as store:
        text_cache.encode_missing_captions(store, captions, never, lambda event: None)
    assert text_cache.text_key("a", "t5") != text_cache.text_key("a", "t6")


def test_what_was_encoded_before_an_interruption_is_kept(
    tmp_path: Path, make_placed_samples: Callable[[int], list[BucketedSample]]
) -> None:
    placed, encoder = make_placed_samples(6), Encoder()

    def interrupted(pixels: Tensor) -> Tensor:
        if len(encoder.shapes) == 2:
            raise KeyboardInterrupt
        return encoder.encode(pixels)

    def words(captions: Sequence[str]) -> list[dict[str, Tensor]]:
        if "cc" in captions:
            raise KeyboardInterrupt
        return [{"rows": torch.ones(1, 2)} for _ in captions]

    store, hashes = TensorStore(tmp_path / "latents", "vae-1"), ContentHashes(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        latent_cache.encode_missing_latents(
            store, placed, OPTIONS, hashes, lambda: interrupted, lambda event: None, batch_size=2
        )
    with pytest.raises(KeyboardInterrupt):
        text_cache.encode_missing_captions(
            store, ["b", "cc"], lambda: in_batches(words), lambda event: None, batch_size=2
        )
    with TensorStore(tmp_path / "latents", "vae-1") as found:  # the first one was never closed
        assert found._index.query("SELECT COUNT(*) FROM entries") == [(4 + 2,)]


def test_text_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    def encode(captions: Sequence[str]) -> list[dict[str, Tensor]]:
        return [{"rows": torch.full((1, 2), torch.nan if caption else 0.0)} for caption in captions]

    with TensorStore(tmp_path, "t5") as store, pytest.raises(CacheError, match="'a cat'"):
        text_cache.encode_missing_captions(
            store, ["a cat"], lambda: in_batches(encode), lambda event: None
        )


def test_a_batch_has_no_more_pixels_than_one_large_image() -> None:
    def sizes(side: int, count: int, batch_size: int) -> list[int]:
        placed = SimpleNamespace(bucket_px=(side, side))
        jobs = [("key", cast(BucketedSample, placed))] * count
        return [len(batch) for batch in latent_cache._iter_bucket_batches(jobs, batch_size)]

    assert sizes(1024, 3, 4) == [1, 1, 1]
    assert sizes(1536, 2, 4) == [1, 1]
    assert sizes(512, 9, 4) == [4, 4, 1]
    assert sizes(512, 9, 8) == [4, 4, 1]
    assert sizes(704, 5, 8) == [2, 2, 1]
    assert sizes(64, 5, 2) == [2, 2, 1]
