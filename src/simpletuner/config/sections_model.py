"""Sections about what is trained: model and adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from simpletuner.config import precisions
from simpletuner.config.option import Not, OptionSection, option
from simpletuner.config.precisions import Precision

# Read this file as a table: name, type and default; one sentence of help; level, bounds, other
# names, and the relations to other options.

ModuleRank = Annotated[int, Field(ge=1, le=1024)]
LORA = {"model_type": "lora"}
STANDARD_LORA = {**LORA, "lora_type": "standard"}
STANDARD_LORA_REASON = 'applies to a standard LoRA only; remove it with lora_type "lycoris"'
QUANTIZED = ("int8", "int4", "nf4", "fp8")
DISCRETE_MEMORY = ("auto", "cuda")  # devices whose memory is not the host's
SHARED_MEMORY_REASON = "needs a GPU with memory of its own; on cpu and mps leave it out"


class ModelOptions(OptionSection):
    """Model and precision."""

    model_family: Literal["chroma"] = option("chroma", "Model architecture.", level="basic")
    model_flavour: Literal["base", "hd", "flash", "nano"] = option(
        "base",
        "Chroma variant: base, hd (higher resolution detail, more expensive), flash (few-step, "
        "unstable to train), nano (tiny and bundled, runs on a CPU).",
        level="basic",
        affects={"plan"},
    )
    model_type: Literal["lora", "full"] = option(
        "lora", "Train an adapter (lora) or all weights of the transformer (full).", level="basic"
    )
    pretrained_model_name_or_path: str | None = option(
        None,
        "Base model: local diffusers folder, Hugging Face repository, or single file "
        "(.safetensors, .gguf) that takes its other parts from the flavour's repository; null is "
        "the flavour's repository.",
        level="basic",
        path="hub",
        affects={"plan"},
    )
    pretrained_transformer_model_name_or_path: str | None = option(
        None,
        "Transformer from another folder, repository or single file.",
        path="hub",
        affects={"plan"},
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None, "VAE from another folder, repository or single file.", path="hub", affects={"plan"}
    )
    pretrained_t5_model_name_or_path: str | None = option(
        None,
        "Text encoder from another folder, repository or single file; its tokenizer is taken "
        "from the same folder, or else from the base model.",
        path="hub",
        affects={"plan"},
    )
    revision: str | None = option(
        None, "Branch, tag or commit of the Hugging Face repository.", affects={"plan"}
    )
    variant: str | None = option(
        None,
        "Variant of the weight files, such as fp16 in model.fp16.safetensors.",
        pattern=r"^[\w.-]+$",
        affects={"plan"},
    )
    mixed_precision: Literal["bf16", "fp16", "no"] = option(
        "bf16",
        "Mixed-precision dtype of the forward pass; no means fp32.",
        level="basic",
        aliases=("model_precision",),
        refused_values={"fp8": "fp8 matrix products are not supported"},
    )
    base_model_default_dtype: Literal["bf16", "fp32"] | None = option(
        None,
        "Dtype of the transformer's weights; null is that of mixed_precision. fp32 with "
        "mixed_precision bf16 keeps fp32 master weights under autocast.",
    )
    base_model_precision: Precision = option(
        "no_change",
        "Quantization of the frozen base model when training a LoRA: int8 (or fp8, which is less "
        "accurate) takes 8 bits per weight, int4 and nf4 about 4.5. Lower needs less memory and "
        "is slightly less accurate. Names of other libraries (nf4-bnb) are accepted as aliases.",
        level="basic",
        value_aliases=precisions.PRECISION_ALIASES,
        refused_values=precisions.REFUSED_PRECISIONS,
        needs=LORA,
        unmet_errors={
            "model_type": 'quantized weights cannot be trained; use no_change or model_type "lora"'
        },
    )
    text_encoder_1_precision: Precision = option(
        "no_change",
        "Quantization of the text encoder; a change encodes all captions again.",
        level="common",
        value_aliases=precisions.PRECISION_ALIASES,
        refused_values=precisions.REFUSED_PRECISIONS,
        affects={"plan"},
    )
    quantize_via: Literal["accelerator", "cpu"] = option(
        "accelerator",
        "Device that quantizes the weights; the result is the same.",
        resume_policy="free",
        refused_values={"pipeline": "weights are always read and quantized one after the other"},
        needs_any={"base_model_precision": QUANTIZED, "text_encoder_1_precision": QUANTIZED},
        affects=set(),
    )
    quantized_cache_dir: str | None = option(
        None,
        "Folder of quantized weights, shared by all runs; null is simpletuner/quantized in the "
        "user's cache folder.",
        resume_policy="free",
        path="new",
        needs_any={"base_model_precision": QUANTIZED, "text_encoder_1_precision": QUANTIZED},
        affects={"plan"},
    )
    gradient_checkpointing: bool | Annotated[int, Field(ge=2, le=1000)] | Literal["auto"] = option(
        "auto",
        "Save memory by computing activations a second time in the backward pass: auto (as few "
        "blocks as the memory of the device requires), true, false, or the number of blocks to "
        "checkpoint. Results are the same.",
        level="basic",
        unit="blocks",
        resume_policy="free",
        affects={"plan"},
    )
    gradient_checkpointing_interval: int | None = option(
        None,
        "Checkpoint only every n-th block; null is every block.",
        unit="blocks",
        resume_policy="free",
        needs={"gradient_checkpointing": Not(False)},
        affects={"plan"},
        ge=1,
    )
    gradient_checkpointing_backend: Literal["torch", "offload"] = option(
        "torch",
        "Where the inputs of checkpointed blocks are kept: on the GPU (torch) or in host memory "
        "(offload).",
        resume_policy="free",
        # Whole blocks are checkpointed, not their feed-forward layers alone: the same numbers.
        value_aliases={"unsloth": "offload", "torch-ffn": "torch", "unsloth-ffn": "offload"},
        needs={"gradient_checkpointing": Not(False), "device": DISCRETE_MEMORY},
        unmet_errors={"device": SHARED_MEMORY_REASON},
        affects={"plan"},
    )
    musubi_blocks_to_swap: float = option(
        0.0,
        "Block swap: number of blocks, or a fraction below 1, whose frozen weights stay in host "
        "memory and are copied to the GPU for each pass. Results are the same; a step is slower "
        "where copying takes longer than computing.",
        level="common",
        unit="blocks",
        resume_policy="free",
        needs={**LORA, "gradient_checkpointing": Not(False), "device": DISCRETE_MEMORY},
        unmet_errors={
            "model_type": 'needs a frozen base; model_type "full" trains it. Use 0',
            "gradient_checkpointing": (
                "needs gradient checkpointing, because autograd would keep the copied "
                "weights for the backward pass; set gradient_checkpointing to true"
            ),
            "device": SHARED_MEMORY_REASON,
        },
        affects={"plan"},
        ge=0,
        le=1000,
    )
    chroma_approximator_device: Literal["auto", "accelerator", "cpu"] = option(
        "auto",
        "Where the weights are that compute Chroma's modulation vectors (0.56 GB): auto has them "
        "on the GPU only while it computes the vectors of the next steps; accelerator leaves them "
        "there; cpu computes on the CPU, which rounds differently and may be slow.",
        resume_policy="free",
        affects={"plan"},
    )
    dynamo_backend: Literal["auto", "no", "dequantize", "inductor", "aot_eager", "eager"] = option(
        "auto",
        "torch.compile: inductor compiles the blocks, minutes at the start, then faster steps on a "
        "GPU; dequantize compiles only how quantised weights are restored, with the same results; "
        "auto takes one of them on a CUDA GPU when the training is long enough to gain from it. "
        "eager and aot_eager are for debugging.",
        level="common",
        affects={"plan"},
    )
    dynamo_mode: Literal["default", "max-autotune-no-cudagraphs"] | None = option(
        None,
        "torch.compile mode of inductor; null is default.",
        # CUDA graphs need fixed shapes and addresses, and batches differ in both.
        value_aliases={
            "reduce-overhead": "default",
            "max-autotune": "max-autotune-no-cudagraphs",
        },
        needs={"dynamo_backend": ("auto", "inductor")},
        affects={"plan"},
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = option(
        "auto",
        "Device to train on; auto is the fastest available.",
        level="common",
        resume_policy="free",
        affects={"plan"},
    )
    torch_num_threads: int | None = option(
        None,
        "Number of CPU threads of torch; null is torch's default. Sums depend on it in their last "
        "bits.",
        unit="threads",
        affects={"plan"},
        ge=1,
        le=1024,
    )
    disable_tf32: bool = option(
        False,
        "Compute fp32 matrix products in full precision instead of TF32 on NVIDIA GPUs.",
    )
    deterministic: bool = option(
        False,
        "Use torch's deterministic algorithms, so that a GPU repeats the same numbers bit for bit; "
        "attention and sums are then slower. A CPU repeats them in any case.",
    )
    flux_t5_padding: Literal["unmodified", "zero"] = option(
        "unmodified",
        "The one padding token that the transformer sees: T5's embedding, or zeros.",
        aliases=("t5_padding",),
        affects=set(),
    )
    tokenizer_max_length: int | None = option(
        None,
        "Maximum caption length in tokens; null is the model's own limit.",
        unit="tokens",
        affects={"plan"},
        ge=2,
        le=512,
    )
    caption_overlong: Literal["truncate", "error"] = option(
        "truncate",
        "Captions over the limit: truncate (counted and listed) or refuse to train.",
        affects=set(),
    )
    vae_dtype: Literal["default", "fp32", "bf16", "fp16"] = option(
        "default",
        "Dtype of the VAE; default is bf16 on accelerators and fp32 on the CPU.",
        affects={"plan"},
    )
    vae_enable_tiling: bool = option(
        False,
        "Encode and decode images in tiles: less memory, faint seams.",
        affects={"plan"},
    )
    vae_enable_slicing: bool = option(
        False,
        "Encode and decode one image at a time.",
        resume_policy="free",
        affects={"plan"},
    )

    @property
    def compiles_blocks(self) -> bool:
        """Return whether torch.compile runs the blocks; "auto" does so only once it is resolved."""
        return self.dynamo_backend in ("inductor", "aot_eager", "eager")

    @property
    def trains_bf16_weights(self) -> bool:
        """Return whether the trained weights are bf16; those of an adapter are float32."""
        dtype = self.base_model_default_dtype or self.mixed_precision
        return self.model_type == "full" and dtype == "bf16"


class AdapterOptions(OptionSection):
    """LoRA."""

    shared_needs: ClassVar[Mapping[str, Any]] = LORA

    lora_rank: int = option(
        16,
        "LoRA rank (dim). Higher means more capacity and a larger file.",
        level="basic",
        aliases=("network_rank", "network_dim"),
        needs=STANDARD_LORA,
        ge=1,
        le=1024,
    )
    lora_rank_by_module: dict[str, ModuleRank] | None = option(
        None,
        "Ranks by module: an object of regular expressions for whole module names, such as "
        '{"single_transformer_blocks.*": 4}; the first that matches counts, other modules have '
        "lora_rank.",
        needs=STANDARD_LORA,
        unmet_errors={"lora_type": STANDARD_LORA_REASON},
    )
    lora_alpha: float | None = option(
        None,
        "LoRA alpha: the strength is alpha / rank, by the rank of each module; null is alpha = "
        "rank.",
        level="common",
        aliases=("network_alpha",),
        needs=STANDARD_LORA,
        affects=set(),
        gt=0,
        le=8192,
    )
    lora_dropout: float = option(
        0.0, "Dropout probability on the adapter's inputs.", level="common", ge=0, lt=1
    )
    lora_type: Literal["standard", "lycoris"] = option(
        "standard",
        "Type of adapter: standard (LoRA or DoRA), or lycoris (as lycoris_config specifies).",
        level="common",
    )
    lycoris_config: str | dict[str, Any] | None = option(
        None,
        "LyCORIS settings: a JSON file or the object itself, with algo (lokr or loha), linear_dim, "
        "linear_alpha, and for lokr factor, full_matrix, decompose_both; apply_preset chooses "
        "modules by class or name, with settings of their own.",
        level="common",
        path="file",
        needs={**LORA, "lora_type": "lycoris"},
        unmet_errors={"lora_type": 'is read with lora_type "lycoris" only'},
    )
    flux_lora_target: Literal["all", "all+ffs", "context", "context+ffs", "tiny", "nano"] = option(
        "all",
        "Modules that get a LoRA: all attention layers, feed-forward layers too (+ffs), the text "
        "stream only (context), two single blocks (tiny), one single block (nano).",
        level="common",
        value_aliases={"ai-toolkit": "all+ffs", "mmdit": "all"},
        refused_values={
            "controlnet": "there is no ControlNet for Chroma",
            "all+ffs+embedder": "add x_embedder to a list in lora_target_modules",
            "tiny+embedder": "add x_embedder to a list in lora_target_modules",
            "all+ffs+embedder+controlnet": "there is no ControlNet for Chroma",
        },
        needs={**LORA, "lora_target_modules": None},
    )
    lora_target_modules: str | list[str] | None = option(
        None,
        "Replaces flux_lora_target: a regular expression for whole module names, or a list of "
        "names or suffixes of names.",
        aliases=("peft_lora_target_modules",),
    )
    use_dora: bool = option(
        False,
        "Train a weight-decomposed LoRA (DoRA): slower, sometimes closer to full-rank training.",
        needs=STANDARD_LORA,
        unmet_errors={"lora_type": STANDARD_LORA_REASON},
    )
    use_rslora: bool = option(
        False,
        "Rank-stabilised LoRA: strength alpha / sqrt(rank), for high ranks.",
        needs=STANDARD_LORA,
        unmet_errors={"lora_type": STANDARD_LORA_REASON},
    )
    lora_init_type: Literal["default", "gaussian", "olora", "pissa"] = option(
        "default",
        "Initialisation of A and B; default is Kaiming-uniform A and zero B.",
        refused_values={
            "loftq": (
                "LoftQ changes the base's weights; pissa initialises from the base, quantized or "
                "not"
            ),
        },
        needs=STANDARD_LORA,
        unmet_errors={"lora_type": STANDARD_LORA_REASON},
    )
    init_lora: str | None = option(
        None,
        "LoRA file to start from, in the layout of any program.",
        level="common",
        path="file",
        unmet_errors={"model_type": 'needs model_type "lora"'},
        affects={"plan"},
    )
    lora_format: Literal["auto", "kohya", "comfyui", "none", "diffusers"] = option(
        "auto",
        "Second file with native names, written in addition to the default file, which diffusers "
        "and ComfyUI load: kohya for Forge and kohya's tools, comfyui for dotted native names, "
        "none (or diffusers) for no second file; auto is kohya wherever it can hold the adapter.",
        level="common",
        resume_policy="free",
        affects=set(),
    )
