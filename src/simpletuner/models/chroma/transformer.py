"""Chroma's transformer: `forward` is the diagram. Parameter names are diffusers'.

B batch · N image tokens (rows * columns of 2x2 latent patches) · L text tokens · S = L + N, text
first
W width (3072) · M modulation vectors (344) · D head width (128)

The class of diffusers is ChromaTransformer2DModel. Text is trimmed to its real tokens and one pad
token, so a batch of equal lengths needs no mask. Where lengths differ, the padding is moved to the
front and each sample attends only to its own rows, again without a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.models.block_executor import BlockExecutor, ResidualBlock
from simpletuner.models.chroma.embeddings import (
    RotaryTables,
    apply_rotary,
    sinusoidal_embedding,
)
from simpletuner.models.chroma.modulations import PreparedModulations
from simpletuner.models.chroma.transformer_config import TransformerConfig

FP16_MAX = 65504.0


# Padding at the front of each sample, which must not be attended to: the number of rows per sample,
# or a (B, 1, 1, S) bool mask that is False there.
Padding = tuple[int, ...] | Tensor | None


def padding_mask(rows: Sequence[int], length: int, device: torch.device) -> Tensor:
    """Return the mask for so many padded rows of each sample in a sequence of `length`."""
    is_real = torch.arange(length)[None] >= torch.tensor(rows)[:, None]
    return is_real[:, None, None].to(device)


def attend_to_real_tokens(q: Tensor, k: Tensor, v: Tensor, padding: Padding) -> Tensor:
    """Attend within each sample, ignoring padding; (B, heads, rows, D).

    q: the last rows of k and v. The output of padded rows is zero or arbitrary. Given the number of
    padded rows, each sample attends on its own, because a mask would exclude the flash kernel.
    """
    if padding is None or isinstance(padding, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=padding)
    rows_without_query = k.shape[2] - q.shape[2]
    samples = []
    for sample_q, sample_k, sample_v, padded_rows in zip(
        q.split(1), k.split(1), v.split(1), padding, strict=True
    ):
        skipped = max(0, padded_rows - rows_without_query)
        real_rows = (
            sample_q[:, :, skipped:],
            sample_k[:, :, padded_rows:],
            sample_v[:, :, padded_rows:],
        )
        samples.append(F.pad(F.scaled_dot_product_attention(*real_rows), (0, 0, skipped, 0)))
    return torch.cat(samples)


def layer_norm_and_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return (1 + scale) * LayerNorm(x) + shift. shift, scale: (B, 1, W)."""
    # For one sample, as the norm's own parameters: one kernel instead of two.
    if len(x) == 1 and x.dtype == scale.dtype:
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps=1e-6)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def add_gated(x: Tensor, gate: Tensor, delta: Tensor) -> Tensor:
    """Return x + gate * delta; float16 saturates instead of overflowing."""
    total = torch.addcmul(x, gate, delta)
    return total.clamp(-FP16_MAX, FP16_MAX) if total.dtype == torch.float16 else total


class RmsNorm(nn.RMSNorm):
    """torch's RMSNorm with the weight cast to the dtype of x.

    Under autocast, a float32 weight would prevent the fused kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GeluProjection(nn.Module):
    """A linear and the tanh GELU; a class of its own because its parameter name is `net.0.proj`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, tanh GELU, linear, with four times the width in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GeluProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result


class Attention(nn.Module):
    """Softmax attention with normalized queries and keys; `joint` adds the text's projections."""

    def __init__(self, config: TransformerConfig, joint: bool) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.attention_head_dim
        self.norm_q = RmsNorm(self.head_dim, eps=1e-6)
        self.norm_k = RmsNorm(self.head_dim, eps=1e-6)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        if joint:
            self.to_out = nn.ModuleList([nn.Linear(width, width)])
            self.norm_added_q = RmsNorm(self.head_dim, eps=1e-6)
            self.norm_added_k = RmsNorm(self.head_dim, eps=1e-6)
            self.add_q_proj = nn.Linear(width, width)
            self.add_k_proj = nn.Linear(width, width)
            self.add_v_proj = nn.Linear(width, width)
            self.to_add_out = nn.Linear(width, width)

    def project_qkv(self, x: Tensor, rows_without_query: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys, values (B, S, heads, D); the first rows give no queries."""
        projected = self.to_q(x[:, rows_without_query:]), self.to_k(x), self.to_v(x)
        q, k, v = (projection.unflatten(-1, (-1, self.head_dim)) for projection in projected)
        return self.norm_q(q), self.norm_k(k), v

    def project_text_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the text's queries, keys and values."""
        layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in layers)
        return self.norm_added_q(q), self.norm_added_k(k), v

    def forward(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, padding: Padding) -> Tensor:
        """(B, rows of q, W). q: the last rows of k and v."""
        rotated = apply_rotary(q, table[-q.shape[1] :]), apply_rotary(k, table), v
        q, k, v = (tensor.transpose(1, 2) for tensor in rotated)
        return attend_to_real_tokens(q, k, v, padding).transpose(1, 2).flatten(2)


class DoubleBlock(ResidualBlock):
    """Image and text streams with separate weights and one joint attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attn = Attention(config, joint=True)
        self.ff = FeedForward(config.width)
        self.ff_context = FeedForward(config.width)

    def last_linears(self) -> tuple[nn.Module, ...]:
        return self.ff_context.net[2], self.ff.net[2]

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_mod: Tensor,
        text_mod: Tensor,
        table: Tensor,
        padding: Padding,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return image, text and the outputs of their feed-forwards, to be added with the gate.

        image_mod, text_mod: (B, 6, W): shift, scale, gate of attention, then of the feed-forward.
        """
        shift, scale, gate, ff_shift, ff_scale, _ = image_mod.split(1, dim=1)
        t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, _ = text_mod.split(1, dim=1)

        image_qkv = self.attn.project_qkv(layer_norm_and_modulate(image, shift, scale))
        text_qkv = self.attn.project_text_qkv(layer_norm_and_modulate(text, t_shift, t_scale))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(text_qkv, image_qkv, strict=True))
        attended = self.attn(q, k, v, table, padding)
        text_attended, image_attended = attended.split((text.shape[1], image.shape[1]), dim=1)

        image = add_gated(image, gate, self.attn.to_out[0](image_attended))
        text = add_gated(text, t_gate, self.attn.to_add_out(text_attended))
        # The image's is the last one, because it is much larger: the last product of a block is
        # not computed again (ResidualBlock).
        text_delta = self.ff_context(layer_norm_and_modulate(text, t_ff_shift, t_ff_scale))
        image_delta = self.ff(layer_norm_and_modulate(image, ff_shift, ff_scale))
        return image, text, image_delta, text_delta


class SingleBlock(ResidualBlock):
    """Both streams as one sequence; attention and feed-forward in parallel."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attn = Attention(config, joint=False)
        self.proj_mlp = nn.Linear(config.width, 4 * config.width)
        self.proj_out = nn.Linear(5 * config.width, config.width)

    def last_linears(self) -> tuple[nn.Module, ...]:
        return (self.proj_out,)

    def forward(
        self, x: Tensor, modulation: Tensor, table: Tensor, padding: Padding, unread: int = 0
    ) -> Tensor:
        """Return (B, S - unread, W), to be added to x with the gate.

        The first `unread` rows only provide keys and values.
        """
        shift, scale, _ = modulation.split(1, dim=1)
        inner = layer_norm_and_modulate(x, shift, scale)
        attended = self.attn(*self.attn.project_qkv(inner, unread), table, padding)
        # Not named, so that the parts are freed before the largest matmul of the step.
        features = torch.cat(
            (attended, F.gelu(self.proj_mlp(inner[:, unread:]), approximate="tanh")), dim=-1
        )
        result: Tensor = self.proj_out(features)
        return result


class ApproximatorLayer(nn.Module):
    """A two-layer MLP of the approximator."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return result


class Approximator(nn.Module):
    """Time to modulation vectors. Never trained or adapted, because that breaks the model."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, count = config.approximator_hidden_dim, config.approximator_layers
        self.in_proj = nn.Linear(config.approximator_num_channels, hidden)
        self.layers = nn.ModuleList(ApproximatorLayer(hidden) for _ in range(count))
        self.norms = nn.ModuleList(RmsNorm(hidden) for _ in range(count))
        self.out_proj = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, M, W) from (B, M, channels).

        Each sample is computed by itself, because a matrix product rounds differently in a larger
        batch: the result is a function of sigma alone. Autocast would depend on the caller.
        """
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([self._compute_sample(sample) for sample in x.split(1)])

    def _compute_sample(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        result: Tensor = self.out_proj(x)
        return result


class ChromaTransformer(nn.Module):
    """Predicts the velocity of packed latents.

    run_block: executes each block, with gradient checkpointing or swapped weights; it does not
    change results. use_padding_mask: describe unequal text lengths by a mask; for compiled blocks,
    which would otherwise be compiled for every combination of lengths. prepared_modulations: those
    computed ahead, where the approximator is not on the device.
    """

    mod_proj: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.run_block = BlockExecutor()
        self.use_padding_mask = False
        self.rotary_tables = RotaryTables(config.axes_dims_rope)
        self.prepared_modulations: PreparedModulations | None = None
        # Explicitly on the CPU, so that it has values in a model built under torch.device("meta");
        # no weight file holds it.
        indices = torch.arange(config.modulation_count, dtype=torch.float32, device="cpu") * 1000
        self.register_buffer("mod_proj", self._index_embedding(indices), persistent=False)
        self.distilled_guidance_layer = Approximator(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.width)
        self.x_embedder = nn.Linear(config.in_channels, config.width)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(config) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(config) for _ in range(config.num_single_layers)
        )
        self.proj_out = nn.Linear(config.width, config.in_channels)

    def _index_embedding(self, indices: Tensor) -> Tensor:
        with torch.device("cpu"):
            return sinusoidal_embedding(indices, self.config.approximator_num_channels // 2)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order of execution."""
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that inputs are cast to."""
        return self.x_embedder.weight.dtype

    @torch.no_grad()
    def modulations(self, sigma: Tensor) -> Tensor:
        """Return (B, M, W) from sigma (B,) float32 in [0, 1]; the guidance input is always 0.

        They are on the device of the approximator.
        """
        weight = self.distilled_guidance_layer.in_proj.weight
        sigma = sigma.to(weight.device, torch.float32)
        channels = self.config.approximator_num_channels // 4
        time = torch.cat(
            (
                sinusoidal_embedding(sigma * 1000, channels),
                sinusoidal_embedding(torch.zeros_like(sigma), channels),
            ),
            -1,
        )
        index = self.mod_proj.to(sigma.device, torch.float32)
        code = torch.cat(
            (time[:, None].expand(-1, len(index), -1), index[None].expand(len(sigma), -1, -1)),
            dim=-1,
        )
        result: Tensor = self.distilled_guidance_layer(code.to(weight.dtype))
        return result

    def forward(
        self,
        tokens: Tensor,
        sigma: Tensor,
        text: Tensor,
        grid: tuple[int, int],
        lengths: Sequence[int] | None = None,
        modulations: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity (B, N, 64) of tokens (B, N, 64); N = rows * columns of `grid`.

        sigma: (B,) float32, on any device. text: (B, L, 4096), right-padded where lengths differ.
        lengths: number of real text rows of each sample; None when all are L. modulations: those of
        `sigma`, if already computed.
        """
        if modulations is None:
            prepared = self.prepared_modulations
            modulations = self.modulations(sigma) if prepared is None else prepared.find(sigma)
        mod = modulations.to(tokens.device, self.dtype)
        table = self.rotary_tables(text.shape[1], *grid, tokens.device)
        padding: Padding = None
        if lengths is not None and any(length != text.shape[1] for length in lengths):
            padding = tuple(text.shape[1] - length for length in lengths)
            # Text has no order of its own: every row sits at position (0, 0, 0).
            text = torch.stack(
                [row.roll(padded_rows, 0) for row, padded_rows in zip(text, padding, strict=True)]
            )
            if self.use_padding_mask:
                padding = padding_mask(padding, text.shape[1] + tokens.shape[1], tokens.device)
        image, text = self.x_embedder(tokens), self.context_embedder(text)

        doubles, singles = len(self.transformer_blocks), len(self.single_transformer_blocks)
        single_mods, image_mods, text_mods, out_mod = mod.split(
            (3 * singles, 6 * doubles, 6 * doubles, 2), dim=1
        )
        for number, block in enumerate(self.transformer_blocks):
            image_mod, text_mod = (
                mods[:, 6 * number : 6 * number + 6] for mods in (image_mods, text_mods)
            )
            image, text, image_delta, text_delta = self.run_block(
                number, block, (image, text), image_mod, text_mod, table, padding
            )
            image = add_gated(image, image_mod[:, 5:], image_delta)
            text = add_gated(text, text_mod[:, 5:], text_delta)
        x = torch.cat((text, image), dim=1)
        for number, block in enumerate(self.single_transformer_blocks):
            single_mod = single_mods[:, 3 * number : 3 * number + 3]
            # The output of the text is not used after the last block.
            unread = text.shape[1] if number == singles - 1 else 0
            (delta,) = self.run_block(
                doubles + number, block, (x,), single_mod, table, padding, unread
            )
            x = add_gated(x[:, unread:], single_mod[:, 2:], delta)
        shift, scale = out_mod.split(1, dim=1)
        result: Tensor = self.proj_out(
            layer_norm_and_modulate(x[:, -tokens.shape[1] :], shift, scale)
        )
        return result
