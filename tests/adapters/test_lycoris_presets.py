"""apply_preset on a network: each module gets its own algorithm, factor and rank, also from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.adapters import attachment
from simpletuner.adapters.adapted_linear import adapted_modules
from simpletuner.adapters.attachment import AttachedAdapter
from simpletuner.adapters.lycoris_targets import choose_lycoris_modules
from simpletuner.config.lycoris_config import parse_lycoris_config
from simpletuner.config.schema import AdapterOptions
from simpletuner.errors import ConfigError
from simpletuner.models.chroma.lora_targets import linear_classes
from tests.adapters.chroma_lora import NAMES, load_adapter, save_adapter
from tests.adapters.tiny_network import perturb, run_forward, tiny_chroma

CONFIG = {
    "algo": "lokr",
    "linear_dim": 2,
    "linear_alpha": 2,
    "factor": 4,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"FeedForward": {"factor": 2}},
        "name_algo_map": {".*to_q": {"algo": "loha", "dim": 3}},
    },
}


def attach(
    network: torch.nn.Module, init_lora: Path | None = None, **changed: object
) -> AttachedAdapter:
    config = {**CONFIG, **changed}
    options = AdapterOptions(
        lora_type="lycoris",
        lycoris_config=config,
        init_lora=None if init_lora is None else str(init_lora),
    )
    parsed = parse_lycoris_config(config)
    assert parsed.preset is not None
    settings = choose_lycoris_modules(parsed, parsed.preset, linear_classes(network))
    return attachment.attach_adapter(
        network, options, list(settings), 5, NAMES, lycoris_settings=settings
    )


def test_each_module_has_the_settings_of_its_class_and_name(tmp_path: Path) -> None:
    network = tiny_chroma()
    attached = attach(network)
    modules = adapted_modules(network)
    assert attached.modules == len(modules)
    for name, module in modules.items():
        factors = dict(module.factors.items())
        if name.endswith("to_q"):
            assert factors["hada_w1_b"].shape[0] == 3, name
        else:
            assert factors["lokr_w1"].shape[0] == (2 if ".ff" in name else 4), name
    assert any(".ff_context." in name for name in modules)
    assert not any("proj_mlp" in name for name in modules)
    perturb(attached.trainable)
    save_adapter(network, tmp_path / "mine.safetensors")
    again, warm = tiny_chroma(), tiny_chroma()
    load_adapter(again, tmp_path / "mine.safetensors")
    attach(warm, tmp_path / "mine.safetensors")
    expected = run_forward(network)
    assert torch.allclose(run_forward(again), expected, atol=1e-6)
    assert torch.allclose(run_forward(warm), expected, atol=1e-6)
    assert not torch.allclose(run_forward(tiny_chroma()), expected, atol=1e-3)
    with pytest.raises(ConfigError, match="lycoris_config"):
        attach(tiny_chroma(), tmp_path / "mine.safetensors", factor=2)
