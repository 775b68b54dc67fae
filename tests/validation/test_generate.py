from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from simpletuner.cli import generation_requests
from simpletuner.cli.generate import command
from simpletuner.cli.trained_weights import LORA_FILE, find_lora_file
from simpletuner.config.schema import AdapterOptions, ModelOptions
from simpletuner.errors import ConfigError, SimpleTunerError
from simpletuner.models.registry import get_family as family_named
from simpletuner.validation import sampling_preview
from simpletuner.validation.inference import Inference
from simpletuner.validation.prompts import Prompt, make_image_specs
from simpletuner.validation.sampler import generate_latents
from simpletuner.validation.validation_images import read_image_metadata
from tests.adapters import chroma_lora
from tests.models.tiny_checkpoint import make_checkpoint

CHROMA = family_named("chroma")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = CHROMA.locate_files(ModelOptions(pretrained_model_name_or_path=str(base)))
    transformer = CHROMA.load_transformer(source, torch.device("cpu"), torch.float32)
    options = AdapterOptions(lora_rank=4)
    attached = chroma_lora.attach_adapter(
        transformer, options, CHROMA.lora_targets(transformer, "all"), seed=1
    )
    with torch.no_grad():
        for _, parameter in attached.trainable:
            parameter.normal_(std=0.3)
    path = tmp_path_factory.mktemp("adapter") / LORA_FILE
    chroma_lora.save_adapter(transformer, path)
    return path


def generate(base: Path | None, out: Path, *more: str) -> list[Path]:
    where = [] if base is None else ["--pretrained_model_name_or_path", str(base)]
    args = [*where, "--out", str(out), "--size", "64", "--steps", "2", *more]
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [Path(line) for line in result.stdout.splitlines()]


def pixels(paths: Sequence[Path]) -> list[bytes]:
    return [Image.open(path).tobytes() for path in paths]


def test_nothing_is_overwritten_and_the_seed_draws_the_same_again(
    base: Path, tmp_path: Path
) -> None:
    two = generate(base, tmp_path, "--prompt", "a red/cat", "--count", "2", "--seed", "7")
    assert [path.name for path in two] == ["a-red-cat-7-64x64.png", "a-red-cat-8-64x64.png"]
    first, second = pixels(two)
    assert first != second
    (again,) = generate(base, tmp_path, "--prompt", "a red/cat", "--seed", "8")
    assert again.name == "a-red-cat-8-64x64-2.png"
    assert max(abs(a - b) for a, b in zip(pixels([again])[0], second, strict=True)) <= 2, (
        "rounding in bfloat16"
    )
    said = read_image_metadata(again)
    assert (said["prompt"], said["seed"], said["steps"]) == ("a red/cat", "8", "2")


def test_a_preview_changes_no_pixel_and_is_removed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(
        sampling_preview, "write_atomically", lambda path, content: written.append(path)
    )
    prompt = ("--prompt", "a fox")
    plain = generate(base, tmp_path / "plain", *prompt)
    shown = generate(base, tmp_path / "shown", *prompt, "--preview")
    assert pixels(plain) == pixels(shown)
    assert written == [tmp_path / "shown" / "preview.jpg"]
    assert sorted((tmp_path / "shown").iterdir()) == shown


def test_strength_0_is_the_base_and_others_are_not(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (plain,) = pixels(generate(base, tmp_path, "--prompt", "a cat"))
    drawn = generate(
        base, tmp_path, "--prompt", "a cat", "--lora", str(adapter), "--strength", "0,0.5,1"
    )
    zero, half, one = pixels(drawn)
    assert zero == plain
    assert len({zero, half, one}) == 3
    assert read_image_metadata(drawn[1])["strength"] == "0.5"


def test_a_run_folder_says_its_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-20").mkdir(parents=True)
    (run / "checkpoint-20" / LORA_FILE).write_bytes(adapter.read_bytes())
    (run / "events.jsonl").touch()
    options = {
        "pretrained_model_name_or_path": str(base),
        "mixed_precision": "no",
        "future_option": 1,
    }
    (run / "config.json").write_text(json.dumps(options))
    ours = pixels(generate(None, tmp_path, "--prompt", "a cat", "--lora", str(run)))
    same = pixels(
        generate(None, tmp_path, "--prompt", "a cat", "--lora", str(run / "checkpoint-20"))
    )
    assert ours == same
    assert ours != pixels(
        generate(None, tmp_path, "--prompt", "a cat", "--lora", str(run), "--strength", "0")
    )


def test_a_run_at_full_rank_draws_with_its_transformer(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_checkpoint(tmp_path / "other", seed=5)
    shutil.copytree(tmp_path / "other" / "transformer", run / "transformer")
    (run / "events.jsonl").touch()
    options = {
        "pretrained_model_name_or_path": str(base),
        "mixed_precision": "no",
        "model_type": "full",
    }
    (run / "config.json").write_text(json.dumps(options))
    (drawn,) = generate(None, tmp_path / "a", "--prompt", "a cat", "--lora", str(run))
    tuned = ["--pretrained_transformer_model_name_or_path", str(run / "transformer")]
    config = ["--config", str(run / "config.json")]
    expected = generate(None, tmp_path / "b", "--prompt", "a cat", *tuned, *config)
    assert pixels([drawn]) == pixels(expected)
    assert pixels([drawn]) != pixels(generate(None, tmp_path / "c", "--prompt", "a cat", *config))
    assert read_image_metadata(drawn)["transformer"] == "run/transformer"


def test_where_a_lora_is_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        find_lora_file(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no pytorch_lora_weights"):
        find_lora_file(tmp_path)
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-200", "checkpoint-300-damaged"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-300-damaged"):
        (tmp_path / name / LORA_FILE).touch()
    assert find_lora_file(tmp_path) == tmp_path / "checkpoint-100" / LORA_FILE
    (tmp_path / LORA_FILE).touch()
    assert find_lora_file(tmp_path) == tmp_path / LORA_FILE
    (tmp_path / "checkpoint-200" / "mine.safetensors").touch()
    assert (
        find_lora_file(tmp_path / "checkpoint-200")
        == tmp_path / "checkpoint-200" / "mine.safetensors"
    )
    (tmp_path / "checkpoint-200" / "other.safetensors").touch()
    with pytest.raises(ConfigError, match="holds 2"):
        find_lora_file(tmp_path / "checkpoint-200")


BAD = {
    "strength word": (
        ["--lora", __file__, "--strength", "strong"],
        "--strength: 'strong' is not a number",
    ),
    "strength range": (
        ["--lora", __file__, "--strength", "1,99"],
        "--strength: '1,99' is not a number",
    ),
    "strength alone": (["--strength", "0.5"], "needs --lora"),
    "size": (["--size", "big"], "--size: 'big' is not a size"),
    "lora": (["--lora", "/nowhere.safetensors"], "/nowhere.safetensors: no such file or folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args, expected = BAD[name]
    with pytest.raises(SimpleTunerError) as caught:
        CliRunner().invoke(command, ["--prompt", "x", *args], catch_exceptions=False)
    assert expected in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys; from simpletuner.cli import command_group; from simpletuner.errors import ConfigError\n"
        "try: command_group(['generate', '--prompt', 'x', '--size', 'big'])\n"
        "except ConfigError as error: print(error, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout.startswith("--size: 'big'"), result.stderr
    assert result.stdout.strip().endswith("False")


def test_chroma_draws_the_same_in_a_batch_as_alone(base: Path) -> None:
    source = CHROMA.locate_files(ModelOptions(pretrained_model_name_or_path=str(base)))
    facts = CHROMA.read_constants(source)
    transformer = CHROMA.load_transformer(source, torch.device("cpu"), torch.float32)
    inference = Inference(CHROMA, facts, torch.device("cpu"), torch.float32)

    def rows(text: str) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(len(text))
        width = facts.text_tensors["rows"].width
        return {"rows": torch.randn(len(text) + 1, width, generator=generator)}

    prompts = [Prompt("a", "cat", "x"), Prompt("b", "a longer text", "none"), Prompt("c", "", "y")]
    listed = make_image_specs(prompts, [(64, 128)], 1, 42)
    together = list(generate_latents(inference, transformer, listed, rows, steps=3, guidance=2.0))
    for picture, latents in together:
        ((_, alone),) = generate_latents(
            inference, transformer, [picture], rows, steps=3, guidance=2.0
        )
        torch.testing.assert_close(latents, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0][1], together[1][1], atol=1e-2)


def test_what_is_no_lora_is_told_before_anything_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(CHROMA), "locate_files", None)
    model = base / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(SimpleTunerError, match="whole weights"):
        generate(base, tmp_path, "--prompt", "a cat", "--lora", str(model))


def test_text_encoder_and_vae_may_lie_elsewhere(base: Path, tmp_path: Path) -> None:
    """As people keep them once for several models: T5 as one file, the VAE in its folder."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    t5, vae = tmp_path / "t5.safetensors", tmp_path / "vae"
    shutil.move(model / "text_encoder" / "model.safetensors", t5)
    shutil.move(model / "vae", vae)
    (plain,) = pixels(generate(base, tmp_path / "out", "--prompt", "a cat"))
    parts = {"t5": t5, "vae": vae}
    flags = [f"--pretrained_{part}_model_name_or_path={place}" for part, place in parts.items()]
    (apart,) = pixels(generate(model, tmp_path / "out", "--prompt", "a cat", *flags))
    assert max(abs(a - b) for a, b in zip(plain, apart, strict=True)) <= 2


def test_a_network_is_loaded_once_for_requests_of_the_same_lora(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests as files, as the pages write them: the images are those of single commands."""
    loaded: list[str] = []
    for name in ("load_transformer", "load_text_encoder"):
        load = getattr(type(CHROMA), name)

        def count(
            *given: object, _name: str = name, _load: object = load, **more: object
        ) -> object:
            loaded.append(_name)
            return _load(*given, **more)  # type: ignore[operator]

        monkeypatch.setattr(type(CHROMA), name, count)
    shared = ["--size=64", "--steps=2", f"--pretrained_model_name_or_path={base}"]
    strengths = ("0.5", "1")
    for at, strength in enumerate(strengths):
        folder = tmp_path / "requests" / str(at)
        folder.mkdir(parents=True)
        words = [*shared, "--prompt=a cat", f"--lora={adapter}", f"--strength={strength}"]
        (folder / "command.json").write_text(json.dumps([*words, f"--out={folder}"]))
        os.utime(folder / "command.json", (at, at))
    monkeypatch.setattr(generation_requests, "IDLE_S", 0.0)
    result = CliRunner().invoke(command, ["--requests", str(tmp_path / "requests")])
    assert result.exit_code == 0, result.output
    assert loaded == ["load_text_encoder", "load_transformer"]
    images = [next((tmp_path / "requests" / str(at)).glob("*.png")) for at in range(2)]
    words = ["--prompt", "a cat", "--lora", str(adapter), "--strength", "0.5,1"]
    assert pixels(images) == pixels(generate(base, tmp_path, *words))
