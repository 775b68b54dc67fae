"""A second family: pixels without a VAE, two text tensors, other widths and names than Chroma's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner.adapters.compatibility import ConsumerProgram, LoadRule, LoraConventions
from simpletuner.adapters.layouts import LAYOUTS
from simpletuner.adapters.module_names import ModuleNames, NativeModule
from simpletuner.cache.batch_types import TextBatch, TextEmbedding
from simpletuner.config.schema import ModelOptions
from simpletuner.events.event_types import Emit
from simpletuner.events.sinks import null_emit
from simpletuner.models import block_executor
from simpletuner.models.encoders import TextEncoder, Vae
from simpletuner.models.family import (
    ArchitectureConstants,
    BlockMemoryPolicy,
    ModelFamily,
    ModelFiles,
    ModelSpec,
    TextTensor,
    WholeTensorOf,
    as_it_is,
)
from simpletuner.models.weights.merge_loras import MergeOutput, WeightedLoras

PATCH_PX, WIDTH, WORDS_WIDTH, STYLE_WIDTH = 8, 24, 10, 5
CONSTANTS = ArchitectureConstants(
    latent_channels=3,
    stride_px=1,
    alignment_px=16,
    token_px=PATCH_PX,
    max_tokens=32,
    text_tensors={
        "words": TextTensor(WORDS_WIDTH),
        "style": TextTensor(STYLE_WIDTH, has_length=False),
    },
    latent_shift=0.1,
    latent_scale=2.0,
)


class PixelBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.sigmoid(self.query(x)).repeat(1, 1, 2) * self.value(x))


class PixelNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH_PX**2, WIDTH)
        self.words = nn.Linear(WORDS_WIDTH, WIDTH)
        self.style = nn.Linear(STYLE_WIDTH, WIDTH)
        self.layers = nn.ModuleList(PixelBlock() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3 * PATCH_PX**2)
        self.run_block = block_executor.BlockExecutor()

    def forward(self, x: Tensor, sigma: Tensor, words: Tensor, style: Tensor) -> Tensor:
        grid = (x.shape[2] // PATCH_PX, x.shape[3] // PATCH_PX)
        tokens = nn.functional.pixel_unshuffle(x, PATCH_PX).flatten(2).transpose(1, 2)
        hidden = self.embed(tokens) + self.words(words)[:, None] + self.style(style)[:, None]
        hidden = hidden + sigma[:, None, None]
        for number, block in enumerate(self.layers):
            (hidden,) = self.run_block(number, block, (hidden,))
        patches = self.head(hidden).transpose(1, 2).unflatten(2, grid)
        return nn.functional.pixel_shuffle(patches, PATCH_PX)


class PixelText(TextEncoder):
    def encode(self, captions: Sequence[str]) -> list[TextEmbedding]:
        return [self._embed(caption) for caption in captions]

    def _embed(self, caption: str) -> TextEmbedding:
        generator = torch.Generator().manual_seed(sum(caption.encode()))
        count = self.token_count(caption)
        return {
            "words": torch.randn(count, WORDS_WIDTH, generator=generator),
            "style": torch.randn(STYLE_WIDTH, generator=generator),
        }

    def token_count(self, caption: str) -> int:
        return len(caption.split()) + 1


class PixelIdentity(Vae):
    def encode(self, pixels: Tensor) -> Tensor:
        return pixels.cpu()

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / CONSTANTS.latent_scale + CONSTANTS.latent_shift).float().cpu()


NAMES = ModuleNames(
    title="Pixels",
    native_modules={
        "stack.{}.qv": NativeModule(("layers.{}.query", "layers.{}.value"), (1, 2)),
        "stack.{}.out": NativeModule(("layers.{}.out",)),
    },
)
SAMPLER = ConsumerProgram(
    version="1",
    title="Pixel sampler",
    source="this test",
    rules={
        layout: LoadRule()
        if layout in ("diffusers", "comfyui")
        else LoadRule("ignored", reason="unknown")
        for layout in LAYOUTS
    },
)
CONVENTIONS = LoraConventions(
    NAMES, {"sampler": SAMPLER}, {"diffusers": ("sampler",), "comfyui": ("sampler",)}
)


class PixelFamily(ModelFamily):
    name = "pixels"
    alignment_px = CONSTANTS.alignment_px
    flavours: Mapping[str, str] = {}
    lora_conventions = CONVENTIONS

    def locate_files(self, options: ModelOptions, emit: Emit = null_emit) -> ModelFiles:
        here = Path(__file__)
        return ModelFiles("pixels", "", here, here, here, here)

    def build_spec(self, options: ModelOptions, dtype: torch.dtype) -> ModelSpec:
        with torch.device("meta"):
            network = PixelNetwork().to(dtype).requires_grad_(False).eval()
        blocks = tuple(network.layers)
        return ModelSpec(network, blocks, WIDTH, 1, CONSTANTS, False, torch.float32, 0, 0, 0, 0)

    def read_constants(self, source: ModelFiles) -> ArchitectureConstants:
        return CONSTANTS

    def text_fingerprint(self, source: ModelFiles, options: ModelOptions) -> str:
        return "pixel text 1"

    def vae_fingerprint(self, source: ModelFiles, options: ModelOptions) -> str:
        return "pixel identity 1"

    def transformer_fingerprint(self, source: ModelFiles) -> str:
        return "pixel network 1"

    def write_quantized_files(
        self,
        source: ModelFiles,
        options: ModelOptions,
        device: torch.device,
        emit: Emit = null_emit,
    ) -> list[Path]:
        return []

    def load_text_encoder(
        self,
        source: ModelFiles,
        options: ModelOptions,
        device: torch.device,
        emit: Emit = null_emit,
    ) -> TextEncoder:
        return PixelText()

    def load_vae(self, source: ModelFiles, options: ModelOptions, device: torch.device) -> Vae:
        return PixelIdentity()

    def load_transformer(
        self,
        source: ModelFiles,
        device: torch.device,
        dtype: torch.dtype,
        options: ModelOptions | None = None,
        emit: Emit = null_emit,
        as_views: bool = False,
    ) -> nn.Module:
        torch.manual_seed(0)
        return PixelNetwork().to(device, dtype).requires_grad_(False).eval()

    def predict_velocity(
        self, transformer: nn.Module, x_sigma: Tensor, sigma: Tensor, text: TextBatch
    ) -> Tensor:
        lengths = torch.tensor(text.lengths["words"], device=x_sigma.device)
        words = text.tensors["words"].float().sum(1) / lengths[:, None]
        velocity: Tensor = transformer(x_sigma, sigma, words, text.tensors["style"].float())
        return velocity.float()

    def block_count(self, transformer: nn.Module) -> int:
        return 3

    def shard_units(self, transformer: nn.Module) -> list[nn.Module]:
        return []

    def place_blocks(
        self, transformer: nn.Module, memory: BlockMemoryPolicy, device: torch.device | None = None
    ) -> None:
        assert isinstance(transformer, PixelNetwork)
        transformer.run_block = block_executor.place_blocks(
            transformer, list(transformer.layers), memory, device, transformer.run_block
        )

    def compile_blocks(self, transformer: nn.Module, options: ModelOptions) -> None:
        assert isinstance(transformer, PixelNetwork)
        transformer.run_block = block_executor.compile_blocks(
            list(transformer.layers), options, transformer.run_block
        )

    def full_finetune_parameters(self, transformer: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return list(transformer.named_parameters())

    def lora_targets(
        self, transformer: nn.Module, preset: str, chosen: str | Sequence[str] | None = None
    ) -> list[str]:
        endings = (".query", ".value", ".out")
        return [name for name, _ in transformer.named_modules() if name.endswith(endings)]

    def linear_classes(self, transformer: nn.Module) -> dict[str, tuple[str, ...]]:
        return dict.fromkeys(self.lora_targets(transformer, ""), ())

    def save_transformer(
        self, transformer: nn.Module, folder: Path | None, whole: WholeTensorOf = as_it_is
    ) -> None:
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"width": WIDTH}))
        save_file(transformer.state_dict(), folder / "model.safetensors")

    def save_native_file(self, folder: Path, file: Path, metadata: Mapping[str, str]) -> None:
        raise AssertionError("not asked for")

    def merge_loras(
        self,
        source: ModelFiles,
        loras: WeightedLoras,
        output: MergeOutput,
        metadata: Mapping[str, str],
        emit: Emit = null_emit,
    ) -> None:
        raise AssertionError("not asked for")
