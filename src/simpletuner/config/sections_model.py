"""Sections about what is trained and on what: model, adapter, data, cache."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from simpletuner.config import precisions
from simpletuner.config.option import OptionSection, option
from simpletuner.config.precisions import Precision

# A table: name, type and default; what it means; its level, bounds and other names.

NOT_YET_REASON = "not offered yet"


class ModelOptions(OptionSection):
    """The model and the numbers it computes with"""

    model_family: Literal["chroma"] = option("chroma", "Architecture.", level="basic")
    model_flavour: Literal["base", "hd", "flash", "nano"] = option(
        "base",
        "Which Chroma: base, hd (finer, dearer), flash (few-step, unstable to train), nano (tiny, bundled, "
        "runs on a CPU).",
        level="basic",
    )
    model_type: Literal["lora", "full"] = option(
        "lora", "Train a small adapter, or every weight of the transformer.", level="basic"
    )
    pretrained_model_name_or_path: str | None = option(
        None,
        "Local diffusers folder, hub repository, or single file (.safetensors, .gguf) with the rest from the "
        "flavour's; null takes the flavour's own.",
        level="basic",
        path="hub",
    )
    pretrained_transformer_model_name_or_path: str | None = option(
        None, "Transformer from somewhere else: folder, repository or single file.", path="hub"
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None, "VAE from somewhere else: folder, repository or single file.", path="hub"
    )
    pretrained_t5_model_name_or_path: str | None = option(
        None,
        "Text encoder from somewhere else: folder, repository or single file; its tokenizer from there or "
        "beside the file, else the main model's.",
        path="hub",
    )
    revision: str | None = option(None, "Branch, tag or commit of the hub repository.")
    variant: str | None = option(
        None,
        "Variant of the weight files, such as fp16 in model.fp16.safetensors.",
        pattern=r"^[\w.-]+$",
    )
    mixed_precision: Literal["bf16", "fp16", "no"] = option(
        "bf16",
        "Number type of the forward pass; no computes in fp32.",
        level="basic",
        aliases=("model_precision",),
        refused_values={"fp8": "fp8 matrix products are not offered"},
    )
    base_model_default_dtype: Literal["bf16", "fp32"] | None = option(
        None,
        "Number type the transformer's weights are kept in; null is that of mixed_precision. fp32 with "
        "mixed_precision bf16 keeps fp32 master weights under autocast.",
    )
    base_model_precision: Precision = option(
        "no_change",
        "Bits per weight of the frozen base's blocks, for a LoRA: int8 (or fp8, which errs more) 8, int4 and "
        "nf4 about 4.5. Converted once, then read from quantized_cache_dir. Libraries' names (nf4-bnb) are "
        "read as these; no library is called.",
        level="basic",
        value_aliases=precisions.PRECISION_ALIASES,
        refused_values=precisions.REFUSED_PRECISIONS,
    )
    text_encoder_1_precision: Precision = option(
        "no_change",
        "The same for the text encoder; captions are then encoded anew.",
        level="common",
        value_aliases=precisions.PRECISION_ALIASES,
        refused_values=precisions.REFUSED_PRECISIONS,
    )
    quantize_via: Literal["accelerator", "cpu"] = option(
        "accelerator",
        "Where weights are converted; the result is the same.",
        resume_policy="free",
        refused_values={"pipeline": "weights are always read one after the other"},
    )
    quantized_cache_dir: str | None = option(
        None,
        "Folder of converted weights, shared by all runs; null is simpletuner/quantized in the user's cache "
        "folder.",
        resume_policy="free",
        path="new",
    )
    gradient_checkpointing: bool | Annotated[int, Field(ge=2, le=1000)] | Literal["auto"] = option(
        True,
        "Recompute blocks in the backward pass: less memory, more time. All, none, as many as memory demands "
        "(auto), or a number: the first so many.",
        level="basic",
        unit="blocks",
        resume_policy="free",
    )
    gradient_checkpointing_interval: int | None = option(
        None,
        "Recompute only every n-th block; null is every block.",
        unit="blocks",
        resume_policy="free",
        ge=1,
    )
    gradient_checkpointing_backend: Literal["torch", "offload"] = option(
        "torch",
        "Where recomputed blocks keep their inputs: on the GPU, or in host memory (offload).",
        resume_policy="free",
        value_aliases={"unsloth": "offload"},
        refused_values=dict.fromkeys(
            ("torch-ffn", "unsloth-ffn"), "blocks are recomputed as a whole"
        ),
    )
    musubi_blocks_to_swap: float = option(
        0.0,
        "Blocks whose frozen weights wait in host memory and are fetched for each pass: a number, or a "
        "fraction below 1. Exact; slower as far as fetching takes longer than computing.",
        level="common",
        unit="blocks",
        resume_policy="free",
        ge=0,
        le=1000,
    )
    chroma_approximator_device: Literal["accelerator", "cpu"] = option(
        "accelerator",
        "Where Chroma's modulations are computed; cpu saves 0.56 GB of a GPU, and rounds differently.",
        resume_policy="free",
    )
    dynamo_backend: Literal["no", "inductor", "aot_eager", "eager"] = option(
        "no",
        "Compile the blocks with torch.compile: minutes at the start, faster steps on a GPU (inductor). The "
        "eager ones are for finding faults.",
        level="common",
        resume_policy="free",
    )
    dynamo_mode: Literal["default", "max-autotune-no-cudagraphs"] | None = option(
        None,
        "How hard inductor searches; null is default.",
        resume_policy="free",
        refused_values=dict.fromkeys(
            ("reduce-overhead", "max-autotune"),
            "CUDA graphs want one shape and fixed addresses, and batches differ in both",
        ),
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = option(
        "auto",
        "Where to train; auto takes the best there is.",
        level="common",
        resume_policy="free",
    )
    torch_num_threads: int | None = option(
        None,
        "CPU threads of torch; null leaves torch's choice.",
        unit="threads",
        resume_policy="free",
        ge=1,
        le=1024,
    )
    disable_tf32: bool = option(
        False, "Keep fp32 products at full precision on NVIDIA.", resume_policy="free"
    )
    flux_t5_padding: Literal["unmodified", "zero"] = option(
        "unmodified",
        "The one padding row the transformer sees: as T5 made it, or zeros.",
        aliases=("t5_padding",),
    )
    tokenizer_max_length: int | None = option(
        None, "Longest caption; null is the model's own limit.", unit="tokens", ge=2, le=512
    )
    caption_overlong: Literal["truncate", "error"] = option(
        "truncate", "Captions over the limit: cut, counted and listed; or refused."
    )
    vae_dtype: Literal["default", "fp32", "bf16", "fp16"] = option(
        "default", "Number type of the VAE; default is bf16 on accelerators and fp32 on the CPU."
    )
    vae_enable_tiling: bool = option(False, "Encode and decode in tiles: less memory, faint seams.")
    vae_enable_slicing: bool = option(
        False, "Encode and decode one picture at a time.", resume_policy="free"
    )


class AdapterOptions(OptionSection):
    """The LoRA"""

    lora_rank: int = option(
        16,
        "Rank: capacity and size.",
        level="basic",
        aliases=("network_rank", "network_dim"),
        ge=1,
        le=1024,
    )
    lora_alpha: float | None = option(
        None,
        "Strength is alpha / rank; null is alpha = rank.",
        level="common",
        aliases=("network_alpha",),
        gt=0,
        le=8192,
    )
    lora_dropout: float = option(
        0.0, "Chance that an input of the LoRA is dropped.", level="common", ge=0, lt=1
    )
    lora_type: Literal["standard", "lycoris"] = option(
        "standard", "Kind of adapter: LoRA (or DoRA), or what lycoris_config says.", level="common"
    )
    lycoris_config: str | dict[str, Any] | None = option(
        None,
        "Of lora_type lycoris: a JSON file, or the object itself, with algo (lokr, loha), linear_dim, "
        "linear_alpha and lokr's factor, full_matrix, decompose_both.",
        level="common",
        path="file",
    )
    flux_lora_target: Literal["all", "all+ffs", "context", "context+ffs", "tiny", "nano"] = option(
        "all",
        "Which modules get a LoRA: all attention, also feed-forwards (+ffs), the text stream only "
        "(context), two single blocks (tiny), one (nano).",
        level="common",
        refused_values={
            "ai-toolkit": "in Chroma these are the modules of all+ffs",
            "mmdit": "in Chroma these are the modules of all",
            "controlnet": "Chroma has no ControlNet here",
        },
    )
    lora_target_modules: str | list[str] | None = option(
        None,
        "Instead of flux_lora_target: a regular expression for whole module names, or a list of names or "
        "their ends.",
        aliases=("peft_lora_target_modules",),
    )
    use_dora: bool = option(False, "Weight-decomposed LoRA: slower, sometimes closer to full rank.")
    use_rslora: bool = option(False, "Strength alpha / sqrt(rank), for high ranks.")
    lora_init_type: Literal["default", "gaussian", "olora", "pissa"] = option(
        "default",
        "How A and B start; default is Kaiming A and zero B.",
        refused_values={
            "loftq": "LoftQ changes the base's weights; pissa starts from the base, quantised or not"
        },
    )
    init_lora: str | None = option(
        None,
        "LoRA file whose weights to start from, of any program's layout.",
        level="common",
        path="file",
    )
    lora_format: Literal["diffusers", "kohya", "comfyui"] = option(
        "diffusers",
        "Layout of a second file beside the LoRA, which diffusers and ComfyUI read: kohya for Forge and "
        "kohya's tools too, comfyui for native names.",
        level="common",
        resume_policy="free",
    )


class DataOptions(OptionSection):
    """Pictures and captions; a dataset's own fields override these"""

    data_backend_config: str | None = option(
        None,
        "The file that lists the datasets; null is multidatabackend.json beside the config file.",
        level="basic",
        resume_policy="free",
        path="file",
    )
    resolution: float = option(
        1024.0, "Training size, in the unit of resolution_type.", level="basic", gt=0, le=16384
    )
    resolution_type: Literal["pixel", "area", "pixel_area"] = option(
        "pixel_area",
        "pixel: shorter edge, px; area: megapixels; pixel_area: edge of the square of that area, px.",
        level="basic",
    )
    caption_strategy: Literal["textfile", "filename", "instanceprompt"] = option(
        "textfile",
        "Where captions come from: a .txt beside each picture, its file name, or instance_prompt for all.",
        level="basic",
        value_aliases={"instance_prompt": "instanceprompt"},
        refused_values=dict.fromkeys(
            ("parquet", "huggingface", "csv", "webshart"), f"caption tables are {NOT_YET_REASON}"
        ),
    )
    instance_prompt: str | None = option(
        None, "The caption of caption_strategy instanceprompt.", level="common"
    )
    prepend_instance_prompt: bool = option(
        False, "Put instance_prompt before each caption.", level="common"
    )
    only_instance_prompt: bool = option(
        False, "Use instance_prompt in place of every caption.", level="common"
    )
    caption_dropout_probability: float = option(
        0.1, "Chance that a visit trains with the empty caption.", level="common", ge=0, le=1
    )
    missing_caption: Literal["error", "empty", "filename", "drop"] = option(
        "error",
        "A picture without its .txt: stop, train without caption, use its file name, leave it out.",
    )
    minimum_image_size: float | None = option(
        None,
        "Smaller pictures are left out, in the unit of resolution_type.",
        level="common",
        zero_is_null=True,
        gt=0,
    )
    maximum_image_size: float | None = option(
        None, "Larger pictures are first shrunk to target_downsample_size.", zero_is_null=True, gt=0
    )
    target_downsample_size: float | None = option(
        None,
        "What pictures over maximum_image_size are shrunk to before cropping.",
        zero_is_null=True,
        gt=0,
    )
    max_image_megapixels: float = option(
        100.0, "Pictures of more pixels are left out unread.", unit="megapixels", gt=0, le=10000
    )
    maximum_aspect_ratio: float = option(
        4.0, "Wider pictures (width / height) are left out.", gt=0, le=1000
    )
    minimum_aspect_ratio: float = option(0.25, "Narrower pictures are left out.", gt=0, le=1000)
    max_bad_sample_fraction: float = option(
        0.1,
        "Refuse to train when more than this share of the pictures is unusable.",
        resume_policy="free",
        ge=0,
        le=1,
    )
    alpha_background: str = option(
        "white",
        "What shows through transparent pixels: white, black or #rrggbb.",
        pattern="^(white|black|#[0-9a-fA-F]{6})$",
    )
    data_backend_sampling: Literal["auto-weighting", "uniform"] = option(
        "auto-weighting",
        "Choose datasets by probability times their length, or by probability alone.",
    )


class CacheOptions(OptionSection):
    """Encoded pictures and captions"""

    cache_dir: str | None = option(
        None,
        "Folder of the caches; null is cache inside output_dir.",
        level="common",
        resume_policy="free",
        path="new",
    )
    vae_cache_sample: Literal["mean", "draw"] = option(
        "draw", "A fresh draw from the VAE's posterior at each visit, or always its mean."
    )
    vae_batch_size: int = option(
        4,
        "Pictures encoded together.",
        level="common",
        unit="pictures",
        resume_policy="free",
        ge=1,
        le=256,
    )
    text_encoder_batch_size: int = option(
        4, "Captions encoded together.", unit="captions", resume_policy="free", ge=1, le=256
    )
    cache_shard_mib: int = option(
        256, "Size of one cache file.", unit="MiB", resume_policy="free", ge=1, le=8192
    )
