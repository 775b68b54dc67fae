"""Vision-language models that are offered for captions, with the memory that they need."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_PROMPT = "Describe this image in one or two plain sentences."


@dataclass(frozen=True)
class CaptioningModel:
    """A model on Hugging Face whose classes are a part of transformers.

    memory_gb: of its weights in bf16, and an allowance for one image.
    """

    id: str
    memory_gb: float


# The smallest first. Sizes follow from the published numbers of parameters.
KNOWN_MODELS: tuple[CaptioningModel, ...] = (
    CaptioningModel("florence-community/Florence-2-base-ft", 1.5),
    CaptioningModel("florence-community/Florence-2-large-ft", 3.0),
    CaptioningModel("Salesforce/blip2-opt-2.7b", 9.0),
    CaptioningModel("Qwen/Qwen2.5-VL-3B-Instruct", 9.5),
    CaptioningModel("Qwen/Qwen2.5-VL-7B-Instruct", 19.0),
    CaptioningModel("fancyfeast/llama-joycaption-beta-one-hf-llava", 19.0),
)


def model_for_memory(total_bytes: int | None) -> CaptioningModel:
    """Return the largest model that fits; the smallest if none does or the size is unknown."""
    gb = (total_bytes or 0) / 1e9
    fitting = [model for model in KNOWN_MODELS if model.memory_gb <= gb]
    return max(fitting, key=lambda model: model.memory_gb, default=KNOWN_MODELS[0])
