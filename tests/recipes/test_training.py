"""The base's training programs: what they share, and the whole recipe at toy size, stopped and
resumed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import budget
import cache_latents
import numpy as np
import parallel
import pytest
import round_trips
import torch
import train_base
import train_transformer
import train_vae
import trials
import vae_images
from diffusers import AutoencoderKL
from muon import Muon, orthogonalised
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import simpletuner.models
from simpletuner.validation.shapes import scene_scoring, scenes

NANO = Path(simpletuner.models.__path__[0]) / "nano"


def test_progress_is_the_larger_share_and_seconds_of_earlier_calls_count() -> None:
    run = budget.Budget(steps=10, minutes=None)
    assert [run.progress(step) for step in (0, 5, 10, 11)] == [0, 0.5, 1, 1]
    run = budget.Budget(steps=10, minutes=1.0, seconds=45.0)
    assert 0.75 <= run.progress(0) < 0.8
    assert run.progress(9) == 0.9
    with pytest.raises(SystemExit, match="--minutes"):
        budget.Budget(None, None)


def test_the_learning_rate_rises_and_ends_at_zero() -> None:
    rates = [budget.learning_rate(1.0, step / 100, step, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0.0)
    assert max(rates) == rates[9]
    assert rates[50] == pytest.approx(0.5)


def test_the_average_follows_and_returns_from_its_state() -> None:
    model = nn.Linear(2, 1)
    average = budget.Average(model, 0.5)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    start = [shadow.clone() for shadow in average.shadow]
    average.update()
    assert torch.allclose(average.shadow[0], start[0] * 0.1)  # d = (1 + 0) / (10 + 0)
    other = budget.Average(nn.Linear(2, 1), 0.5)
    other.load_state_dict(average.state_dict())
    other.copy_to(model)
    assert torch.equal(model.weight, average.shadow[0])


def test_results_come_in_order_with_and_without_workers() -> None:
    assert list(parallel.map_in_order(abs, range(-4, 0), 0)) == [4, 3, 2, 1]
    assert list(parallel.map_in_order(abs, range(-9, 0), 2)) == list(range(9, 0, -1))


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 8, 20), (2, 20, 8)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)).float())
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam() -> None:
    torch.manual_seed(0)
    conv, first = nn.Conv2d(3, 4, 3), nn.Linear(5, 6, bias=False)
    optimizer = Muon([*conv.parameters(), first.weight], lr=0.1, by_adam=[first.weight])
    before = [param.detach().clone() for param in (conv.weight, conv.bias, first.weight)]
    for param in (conv.weight, conv.bias, first.weight):
        param.grad = torch.randn_like(param)
    optimizer.step()
    moved = [
        param.detach() - old for param, old in zip((conv.weight, conv.bias, first.weight), before)
    ]
    values = torch.linalg.svdvals(moved[0].flatten(1)) / (0.1 * 0.2 * 27**0.5)
    assert values.min() > 0.6
    assert values.max() < 1.3
    for update, param in zip(moved[1:], (conv.bias, first.weight)):  # Adam's first step is the sign
        assert torch.allclose(update, -0.1 * param.grad.sign(), atol=1e-5)


def test_a_batch_is_a_function_of_its_address() -> None:
    address = vae_images.BatchAddress(3, 2, 64)
    assert np.array_equal(vae_images.make_batch(address), vae_images.make_batch(address))
    assert not np.array_equal(
        vae_images.make_batch(address), vae_images.make_batch(address._replace(step=4))
    )
    assert vae_images.make_batch(address).shape == (2, 64, 64, 3)
    whole = vae_images.make_batch(vae_images.BatchAddress(0, 1, scenes.SIDE_PX))
    assert np.array_equal(whole[0], np.asarray(vae_images.make_image(vae_images.TRAIN_SEED, 0)))


def test_folding_gives_even_channels_and_the_same_image() -> None:
    torch.manual_seed(0)
    model = train_vae.build_vae()
    with torch.no_grad():
        model.encoder.conv_out.weight[:16] *= torch.linspace(0.2, 3, 16)[:, None, None, None]
    pixels = vae_images.unseen_images(2, True, torch.device("cpu"))
    with torch.no_grad():
        before = model.decode(model.encode(pixels).latent_dist.mean).sample
    _, std = train_vae.channel_statistics(model, pixels)
    assert std.max() > 2 * std.min()
    train_vae.fold_statistics(model, torch.zeros(16), std)
    with torch.no_grad():
        after = model.decode(model.encode(pixels).latent_dist.mean).sample
    assert torch.allclose(before, after, atol=1e-4)
    mean, std = train_vae.channel_statistics(model, pixels)
    assert torch.allclose(std, torch.ones(16), atol=1e-3)
    train_vae.fold_statistics(model, mean, std)
    mean, _ = train_vae.channel_statistics(model, pixels)
    assert mean.abs().max() < 1e-3


def test_what_the_score_asks_for_is_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = [scenes.compose_scene(scene_scoring.TRAINED_SEED, number) for number in range(40)]
    reworded = [replace(trained[number], caption=f"{number}") for number in (7, 11)]
    asked = [trained[3], *reworded], [False, True, False]
    monkeypatch.setattr(scene_scoring, "unseen_scenes", lambda count: asked)
    numbers = cache_latents.scene_numbers(scene_scoring.TRAINED_SEED, 40)
    assert not {3, 7} & set(numbers)
    assert {11} < set(numbers)  # its combination is in the training pictures anyway
    assert cache_latents.scene_numbers(cache_latents.HELD_SEED, 5) == [0, 1, 2, 3, 4]


def test_more_drawings_are_added_to_what_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last chunk grows, complete chunks stay, and the result is that of one call."""

    class Encoder:
        def __init__(self, base: Path, device: torch.device) -> None:
            pass

        def encode(self, levels: np.ndarray, captions: list[str]) -> dict[str, torch.Tensor]:
            return {"ids": torch.tensor([[len(caption)] for caption in captions])}

    monkeypatch.setattr(cache_latents, "Encoder", Encoder)
    monkeypatch.setattr(cache_latents, "CHUNK", 4)

    def cached(name: str, count: int) -> torch.Tensor:
        seed, cpu = cache_latents.HELD_SEED, torch.device("cpu")
        cache_latents.cache_scenes(tmp_path, tmp_path / name, count, seed, cpu, 0, 3)
        return cache_latents.load_chunks(tmp_path / name)["ids"]

    assert len(cached("grown", 6)) == 6
    first = (tmp_path / "grown" / "00000.safetensors").stat().st_mtime_ns
    assert torch.equal(cached("grown", 11), cached("whole", 11))
    assert (tmp_path / "grown" / "00000.safetensors").stat().st_mtime_ns == first
    captions = [
        scenes.compose_scene(cache_latents.HELD_SEED, number).caption for number in range(11)
    ]
    assert cached("grown", 11)[:, 0].tolist() == [len(caption) for caption in captions]


def test_every_epoch_has_every_drawing_once() -> None:
    data = train_transformer.Data.__new__(train_transformer.Data)
    data.latents = torch.zeros(7)
    stream = torch.cat([data.indices(first, 3) for first in range(0, 21, 3)])
    assert all(sorted(stream[start : start + 7].tolist()) == list(range(7)) for start in (0, 7, 14))
    assert stream[:7].tolist() != stream[7:14].tolist()


def test_a_dropped_caption_is_its_end_alone() -> None:
    ids, lengths = torch.tensor([[5, 6, 1, 0], [7, 1, 0, 0]]), torch.tensor([3, 2])
    ids, lengths = train_transformer.without_caption(ids, lengths, torch.tensor([True, False]))
    assert ids.tolist() == [[1, 0, 0, 0], [7, 1, 0, 0]]
    assert lengths.tolist() == [1, 2]


def test_the_recipe_from_nothing_at_toy_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a signal after the transformer's first step, resumed, equal to a run in one go."""
    arguments = ["--size", "toy", "--device", "cpu"]
    monkeypatch.setattr(train_base.Recipe, "score", lambda recipe: None)
    update = train_transformer.Trainer.update

    def stop(trainer: train_transformer.Trainer, progress: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        update(trainer, progress)

    with monkeypatch.context() as patch:
        patch.setattr(train_transformer.Trainer, "update", stop)
        with pytest.raises(SystemExit, match="resumes"):
            train_base.main(["--work", str(tmp_path), *arguments])
    bundle, run = tmp_path / "bundle", tmp_path / "transformer"
    assert not bundle.exists()
    assert torch.load(run / "state.pt", weights_only=True)["step"] == 1
    (tmp_path / "whole").mkdir()
    train_transformer.main([
        "--base", str(tmp_path / "base"), "--latents", str(tmp_path / "latents"),
        "--held", str(tmp_path / "held"), "--out", str(tmp_path / "whole"), "--device", "cpu",
        "--steps", "2", "--batch-size", "4", "--learning-rate", "0.001", "--save", "2",
    ])  # fmt: skip
    train_base.main(["--work", str(tmp_path), *arguments])
    states = [
        torch.load(path / "state.pt", weights_only=True) for path in (run, tmp_path / "whole")
    ]
    assert all(state["step"] == 2 for state in states)
    for name, weight in states[0]["model"].items():
        assert torch.equal(weight, states[1]["model"][name]), name
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "held_out" in row] == [2]
    assert AutoencoderKL.from_pretrained(bundle / "vae").config.latent_channels == 16
    assert (bundle / "model_index.json").exists()
    compare_text_encoders(tmp_path, monkeypatch)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    train_base.main(["--work", str(tmp_path), *arguments])  # nothing is left to do
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def compare_text_encoders(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial of the text encoder: it learns, the loss is found in its log, and it is run once."""
    chosen = {"text": trials.Trial("", batch_size=2, rest=("--train-text",))}
    monkeypatch.setattr(trials, "TRIALS", chosen)
    monkeypatch.setattr(
        trials.make_transformer,
        "main",
        lambda arguments: shutil.copytree(
            work / "base" / "transformer", work / "trials" / "untrained-2-4" / "transformer"
        ),
    )
    first = trials.run(work, "text", 4, "cpu")
    before = load_file(work / "base" / "text_encoder" / "model.safetensors")
    after = load_file(work / "trials" / "text" / "text_encoder" / "model.safetensors")
    assert not torch.equal(before["shared.weight"].float(), after["shared.weight"])
    frozen = load_file(work / "transformer" / "text_encoder" / "model.safetensors")
    assert torch.equal(before["shared.weight"].float(), frozen["shared.weight"])
    monkeypatch.setattr(train_transformer, "main", lambda arguments: pytest.fail("run again"))
    assert trials.run(work, "text", 4, "cpu") == first


def test_round_trips_show_every_shape_beside_its_reconstruction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.png"
    monkeypatch.setattr("sys.argv", ["", "--vae", str(NANO / "vae"), "--out", str(page)])
    round_trips.main()
    image = np.asarray(Image.open(page)).astype(int)
    side, gap = scenes.SIDE_PX * round_trips.ENLARGED, round_trips.GAP_PX
    cells = len(scenes.SHAPES) + round_trips.TEXTURES
    rows = cells // round_trips.COLUMNS
    assert image.shape == (rows * (side + gap), round_trips.COLUMNS * (2 * side + 2 * gap), 3)
    original, decoded = image[:side, :side], image[:side, side : 2 * side]
    assert np.abs(original - decoded).mean() < 10
    assert np.abs(original - decoded).max() > 0
