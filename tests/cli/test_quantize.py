"""simpletuner quantize: ahead of time, found again, with the names that people write."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="needs torch")

from simpletuner.cli.quantize import command
from simpletuner.errors import ConfigError
from simpletuner.models.weights.tensor_loading import read_stored_tensors


def test_files_are_printed_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model_flavour", "nano", "--base_model_precision=nf4-bnb", "--device=cpu"]
    words += ["--text_encoder_1_precision=int8", f"--quantized_cache_dir={tmp_path / 'kept'}"]
    first = CliRunner().invoke(command, words, catch_exceptions=False)
    assert "base_model_precision nf4-bnb is read as nf4" in first.stderr
    assert "quantize to nf4" in first.stderr
    files = [Path(line) for line in first.stdout.splitlines()]
    assert [file.name.split("-")[:2] for file in files] == [["chroma", "nf4"], ["t5", "int8"]]
    assert "transformer_blocks.0.attn.to_q.absmax" in read_stored_tensors(files[0])
    again = CliRunner().invoke(command, words, catch_exceptions=False)
    assert again.stdout == first.stdout
    assert "quantize to" not in again.stderr


def test_without_a_precision_there_is_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--base_model_precision=nf4"):
        CliRunner().invoke(command, ["--model_flavour=nano"], catch_exceptions=False)
