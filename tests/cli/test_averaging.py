"""simpletuner export --average: LoRA files, checkpoints of one run, and full-rank weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from simpletuner.adapters.average_deltas import average_factors, relative_distance
from simpletuner.adapters.deltas import LowRankDelta, LycorisDelta
from simpletuner.adapters.merge_deltas import sum_weighted_loras
from simpletuner.cli.averaging import parse_weights
from simpletuner.cli.export import command
from simpletuner.config.schema import AdapterOptions
from simpletuner.errors import ConfigError, ModelError
from tests.adapters import chroma_lora
from tests.adapters.chroma_lora import attach_adapter
from tests.adapters.tiny_network import attention_names, perturb, tiny_chroma

NAME = "pytorch_lora_weights.safetensors"


def run(*words: object) -> Result:
    result = CliRunner().invoke(command, [str(word) for word in words], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def write_loras(root: Path, ranks: tuple[int, ...], one_run: bool, **options: object) -> list[Path]:
    """Write a LoRA per rank, as checkpoints of one run or as files of several."""
    folders = []
    for number, rank in enumerate(ranks, 1):
        network = tiny_chroma()
        adapter = AdapterOptions(lora_rank=rank, **options)
        attached = attach_adapter(network, adapter, attention_names(network), 5)
        perturb(attached.trainable, 0.1 * number)
        folder = root / ("run" if one_run else f"run{number}") / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        (folder.parent / "events.jsonl").touch()
        chroma_lora.save_adapter(network, folder / NAME)
        folders.append(folder)
    return folders


def dense(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: delta.up.double() @ delta.down.double()
        for name, delta in chroma_lora.read_lora_file(path).to_deltas().items()
    }


def weighted(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    parts = [dense(folder / NAME) for folder in folders]
    return {
        name: sum(part[name] * weight for part, weight in zip(parts, weights)) for name in parts[0]
    }


def test_other_runs_give_the_mean_of_the_deltas(tmp_path: Path) -> None:
    folders = write_loras(tmp_path, (2, 3), one_run=False)
    output = tmp_path / "mean.safetensors"
    result = run(*folders, "--output", output, "--rank", 5, "--average", "1,3")
    assert "the mean of the deltas at rank 5: it differs by 0.00%" in result.stderr
    wanted = weighted(folders, [0.25, 0.75])
    for name, delta in dense(output).items():
        assert torch.allclose(delta, wanted[name], atol=1e-6)
    smaller = tmp_path / "rank3.safetensors"
    result = run(*folders, "--output", smaller, "--average")
    assert "the mean of the deltas at rank 3" in result.stderr
    wanted = weighted(folders, [0.5, 0.5])
    for name, delta in dense(smaller).items():
        best = torch.linalg.svdvals(wanted[name])[3:].square().sum().sqrt()
        assert (delta - wanted[name]).norm() == pytest.approx(float(best), rel=1e-3, abs=1e-6)


def test_one_run_gives_the_mean_of_the_factors(tmp_path: Path) -> None:
    folders = write_loras(tmp_path, (4, 4, 4), one_run=True)
    output = tmp_path / "mean.safetensors"
    result = run(*folders, "--output", output, "--average")
    assert "the mean of the factors" in result.stderr
    found = load_file(output)
    stored = [load_file(folder / NAME) for folder in folders]
    assert found.keys() == stored[0].keys()
    for key, tensor in found.items():
        mean = torch.stack([part[key] for part in stored]).double().mean(0)
        assert torch.allclose(tensor.double(), mean, atol=1e-6)
    exact = weighted(folders, [1 / 3] * 3)
    away = sum((delta - exact[name]).square().sum() for name, delta in dense(output).items())
    total = sum(delta.square().sum() for delta in exact.values())
    assert f"by {float((away / total).sqrt()):.2%}" in result.stderr


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_type": "lycoris"}])
def test_dora_and_lycoris_are_averaged_within_one_run_only(
    options: dict[str, object], tmp_path: Path
) -> None:
    if "lora_type" in options:
        options = {**options, "lycoris_config": {"algo": "lokr", "linear_dim": 2, "factor": 4}}
    folders = write_loras(tmp_path, (3, 3), one_run=True, **options)
    output = tmp_path / "mean.safetensors"
    run(*folders, "--output", output, "--average")
    found, (one, two) = load_file(output), [load_file(folder / NAME) for folder in folders]
    assert found.keys() == one.keys()
    for key, tensor in found.items():
        assert torch.allclose(tensor, (one[key] + two[key]) / 2, atol=1e-6), key
    others = write_loras(tmp_path / "others", (3, 3), one_run=False, **options)
    with pytest.raises(ModelError, match=r"a DoRA cannot|a LoHa or LoKr cannot"):
        run(*others, "--output", tmp_path / "refused.safetensors", "--average")
    assert not (tmp_path / "refused.safetensors").exists()


def test_factors_of_other_shapes_are_refused() -> None:
    def lora(rank: int) -> dict[str, LowRankDelta | LycorisDelta]:
        return {"m": LowRankDelta(torch.ones(rank, 4), torch.ones(3, rank))}

    with pytest.raises(ModelError, match="another kind or rank"):
        average_factors([(lora(2), 0.5), (lora(3), 0.5)])
    with pytest.raises(ModelError, match="different modules"):
        average_factors([(lora(2), 0.5), ({}, 0.5)])
    same = average_factors([(lora(2), 0.5), (lora(2), 0.5)])
    assert relative_distance(same, sum_weighted_loras([(lora(2), 0.5), (lora(2), 0.5)])) == 0


def test_weights_add_up_to_one() -> None:
    assert parse_weights("equal", 4) == [0.25] * 4
    assert parse_weights("1, 3", 2) == [0.25, 0.75]
    for text in ("1", "1,-1", "1,x", "0,0", "1,inf", "1,2,3"):
        with pytest.raises(ConfigError, match="is not a list of 2 weights"):
            parse_weights(text, 2)


def test_full_rank_checkpoints_become_a_transformer_folder(tmp_path: Path) -> None:
    from simpletuner.config.schema import ModelOptions
    from simpletuner.events.sinks import null_emit
    from simpletuner.models.registry import get_family
    from simpletuner.training import checkpoint

    family = get_family("chroma")
    options = ModelOptions(model_flavour="nano")
    network = family.load_transformer(
        family.locate_files(options, null_emit), torch.device("cpu"), torch.bfloat16, options
    )
    trained = {n: p.detach() for n, p in family.full_finetune_parameters(network)}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "events.jsonl").touch()
    (folder / "config.json").write_text(json.dumps({"model_flavour": "nano", "model_type": "full"}))
    for step, shift in ((1, 0.25), (2, 0.75)):
        data = {name: tensor + shift for name, tensor in trained.items()}
        snapshot = checkpoint.CheckpointData(step, {"weights": data}, {"config": {}})
        checkpoint.save_checkpoint(folder, snapshot, None, keep=5)
    output = tmp_path / "mean"
    result = run(folder / "checkpoint-1", folder / "checkpoint-2", "--output", output, "--average")
    assert f"{len(trained)} tensors, summed in float64" in result.stderr
    stored = [load_file(folder / f"checkpoint-{step}" / "weights.safetensors") for step in (1, 2)]
    found = {}
    for file in output.glob("*.safetensors"):
        found |= load_file(file)
    for name, parameter in network.named_parameters():
        if name in trained:
            mean = (stored[0][name].double() + stored[1][name].double()) / 2
            assert torch.equal(found[name], mean.to(torch.bfloat16)), name
        else:
            assert torch.equal(found[name], parameter), name
    again = tmp_path / "again"
    run(output, output, "--output", again, "--average")
    for file in output.glob("*.safetensors"):
        assert (again / file.name).read_bytes() == file.read_bytes()
    (folder / "checkpoint-2" / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(Exception, match="bytes instead of"):
        run(
            folder / "checkpoint-1",
            folder / "checkpoint-2",
            "--output",
            tmp_path / "x",
            "--average",
        )


def test_what_cannot_be_averaged_is_said(tmp_path: Path) -> None:
    one, two = write_loras(tmp_path, (2, 2), one_run=True)
    output = tmp_path / "mean.safetensors"
    for words, part in (
        ((one, two), "several sources are averaged: add --average"),
        ((one, "--average"), "needs two sources or more"),
        ((one, two, "--average"), "needs two sources or more, and --output"),
        ((one, two, "--check", "--average"), "without --check"),
        ((one, tmp_path / "no", "--output", output, "--average"), "no such file or folder"),
        ((one, two, "--output", one / NAME, "--average"), "exists and is not overwritten"),
        ((one, two, "--output", tmp_path / "folder", "--average"), "is not a .safetensors file"),
    ):
        with pytest.raises(ConfigError, match=part):
            run(*words)
