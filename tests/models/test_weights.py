from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from simpletuner.errors import ModelError
from simpletuner.models.chroma.weights import load_transformer, save_transformer

CPU = torch.device("cpu")
FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint / "transformer", tmp_path / "transformer"))


def test_what_diffusers_wrote_is_read_bit_for_bit(folder: Path) -> None:
    transformer = load_transformer(folder, CPU, torch.float32)
    theirs = ChromaTransformer2DModel.from_pretrained(folder).state_dict()
    assert transformer.state_dict().keys() == theirs.keys()
    assert all(
        torch.equal(tensor, theirs[name]) for name, tensor in transformer.state_dict().items()
    )
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert not transformer.training


def test_the_cast_is_made_while_reading(folder: Path) -> None:
    transformer = load_transformer(folder, CPU, torch.bfloat16)
    stored = load_file(folder / FILE)
    assert all(
        torch.equal(t, stored[name].bfloat16()) for name, t in transformer.state_dict().items()
    )
    assert transformer.mod_proj.dtype == torch.float32


def test_the_file_may_be_rewritten_under_a_loaded_model(folder: Path) -> None:
    transformer = load_transformer(folder, CPU, torch.float32)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    size = (folder / FILE).stat().st_size
    with (folder / FILE).open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\0" * (size - size // 2))
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items()
    )


def test_views_share_the_memory_of_the_file_and_casts_do_not(folder: Path) -> None:
    size = (folder / FILE).stat().st_size
    copies = load_transformer(folder, CPU, torch.float32).state_dict()
    views = load_transformer(folder, CPU, torch.float32, as_views=True).state_dict()
    assert all(torch.equal(tensor, copies[name]) for name, tensor in views.items())
    assert {tensor.untyped_storage().nbytes() for tensor in views.values()} == {size}
    assert len({tensor.untyped_storage().data_ptr() for tensor in views.values()}) == 1
    assert size not in {tensor.untyped_storage().nbytes() for tensor in copies.values()}
    cast = load_transformer(folder, CPU, torch.bfloat16, as_views=True).state_dict()
    assert all(torch.equal(tensor, copies[name].bfloat16()) for name, tensor in cast.items())


def test_saved_weights_load_here_and_in_diffusers(folder: Path, tmp_path: Path) -> None:
    transformer = load_transformer(folder, CPU, torch.float32)
    save_transformer(transformer, tmp_path / "saved")
    again = load_transformer(tmp_path / "saved", CPU, torch.float32).state_dict()
    theirs = ChromaTransformer2DModel.from_pretrained(tmp_path / "saved").state_dict()
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, theirs[name])


def test_sharded_weights_are_read(folder: Path, tmp_path: Path) -> None:
    model = ChromaTransformer2DModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    state = load_transformer(tmp_path / "sharded", CPU, torch.float32).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    next((tmp_path / "sharded").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(ModelError, match="00002-of"):
        load_transformer(tmp_path / "sharded", CPU, torch.float32)


def test_large_models_are_saved_in_several_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are those of huggingface_hub, which diffusers writes with."""
    transformer = load_transformer(folder, CPU, torch.float32)
    monkeypatch.setattr("simpletuner.models.chroma.weights.SHARD_BYTES", 100_000)
    save_transformer(transformer, tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    save_torch_state_dict(
        transformer.state_dict(),
        tmp_path / "theirs",
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=100_000,
    )
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert len(files) > 3
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", *files]
    for file in files:
        if file != INDEX:
            assert (tmp_path / "ours" / file).read_bytes() == (
                tmp_path / "theirs" / file
            ).read_bytes()
    ours, theirs = (json.loads((tmp_path / who / INDEX).read_text()) for who in ("ours", "theirs"))
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    read = load_transformer(tmp_path / "ours", CPU, torch.float32).state_dict()
    assert all(torch.equal(t, read[name]) for name, t in transformer.state_dict().items())


def test_a_variant_is_read_by_its_name(folder: Path) -> None:
    (folder / FILE).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    load_transformer(folder, CPU, torch.float32, variant="fp16")
    with pytest.raises(ModelError, match=FILE):
        load_transformer(folder, CPU, torch.float32)


def test_missing_surplus_and_misshapen_tensors_are_listed_together(folder: Path) -> None:
    state = load_file(folder / FILE)
    del state["proj_out.bias"]
    state["stranger"] = torch.zeros(3)
    state["x_embedder.bias"] = torch.zeros(5)
    save_file(state, folder / FILE)
    with pytest.raises(ModelError) as caught:
        load_transformer(folder, CPU, torch.float32)
    text = str(caught.value)
    assert "proj_out.bias (64,) is missing" in text
    assert "stranger (3,) is unexpected" in text
    assert "x_embedder.bias is (5,), expected (64,)" in text


@pytest.mark.parametrize("kept", [0, 5, 300, 0.5, 0.999])
def test_a_truncated_file_is_named_before_anything_is_read(folder: Path, kept: float) -> None:
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(
        whole[: int(kept * len(whole)) if isinstance(kept, float) else kept]
    )
    with pytest.raises(ModelError, match=rf"{FILE}.*Download it again"):
        load_transformer(folder, CPU, torch.float32)


def test_a_file_with_a_tail_is_damaged(folder: Path) -> None:
    with (folder / FILE).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelError, match="damaged"):
        load_transformer(folder, CPU, torch.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"guidance_embeds": True}, "guidance_embeds"),
        ({"patch_size": 2}, "patch_size 1"),
        ({"axes_dims_rope": [8, 8, 8]}, "axes_dims_rope"),
        ({"axes_dims_rope": 32}, "axes_dims_rope"),
        ({"axes_dims_rope": ["8", 12, 12]}, "axes_dims_rope = "),
        ({"num_layers": "2"}, "num_layers = '2' is not"),
        ({"num_layers": None}, "num_layers = None"),
        ({"num_layers": 3}, r"transformer_blocks\.2.* is missing"),
    ],
)
def test_a_config_that_is_not_chromas_is_refused(
    folder: Path, change: dict[str, object], said: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=said):
        load_transformer(folder, CPU, torch.float32)


def test_the_published_configs_carry_two_fields_of_flux(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    published = config | {"guidance_embeds": False, "pooled_projection_dim": 768}
    (folder / "config.json").write_text(json.dumps(published))
    load_transformer(folder, CPU, torch.float32)


def test_a_broken_config_file_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"num_layers": ')
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_transformer(folder, CPU, torch.float32)
