"""The model card: README.md of the run folder, as the hub shows it. No path, token or name of a machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpletuner.atomic_io import write_atomically
from simpletuner.config.load import resolved_options
from simpletuner.config.lycoris_config import describe_adapter
from simpletuner.config.option_catalog import all_options
from simpletuner.config.paths import HUB_ID_PATTERN
from simpletuner.config.schema import RunConfig
from simpletuner.training.model_metadata import RunMetadata
from simpletuner.validation.validation_images import read_image_metadata

MAX_CARD_IMAGES = 12  # pictures
# Options that say where something is or how it was watched, not how it was trained.
OMITTED_SECTIONS = ("logging", "publishing", "cache", "checkpoint", "validation")
SINGLE_WORD = re.compile(r"[\w.+,-]{1,40}")
LORA_USAGE = """
With diffusers:

```python
import torch
from diffusers import ChromaPipeline

pipe = ChromaPipeline.from_pretrained({base}, torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights({place}, weight_name="pytorch_lora_weights.safetensors")
image = pipe({prompt}, num_inference_steps=28, guidance_scale=3.0).images[0]
```

ComfyUI: put `pytorch_lora_weights.safetensors` into `models/loras` and add the node "LoraLoaderModelOnly"
between the Chroma model and the sampler. Forge: put {forge}
into `models/Lora`.
"""
NANO_USAGE = """
```bash
simpletuner generate --model_flavour nano --lora . --prompt {prompt}
```

The bundled base is a small model for trying things out; other programs do not load what was trained on it.

"""
FULL_RANK_USAGE = """
With diffusers:

```python
import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel

tuned = ChromaTransformer2DModel.from_pretrained(
    {place}, subfolder="transformer", torch_dtype=torch.bfloat16
)
pipe = ChromaPipeline.from_pretrained({base}, transformer=tuned, torch_dtype=torch.bfloat16).to("cuda")
image = pipe({prompt}, num_inference_steps=28, guidance_scale=3.0).images[0]
```

ComfyUI: put {native} into `models/diffusion_models` and load it with "Load Diffusion Model". Forge: into
`models/Stable-diffusion`.
"""


LYCORIS_USAGE = """
ComfyUI: put `pytorch_lora_weights.safetensors` into `models/loras` and add the node "LoraLoaderModelOnly"
between the Chroma model and the sampler. Forge: into `models/Lora`.

diffusers loads none of its kind into Chroma; it loads the LoRA near it that this writes, and says how near:

```bash
simpletuner export pytorch_lora_weights.safetensors --format diffusers --rank 64
```
"""


def write_model_card(run_dir: Path, told: RunMetadata, step: int) -> Path:
    """README.md: front matter for the hub, pictures, settings, and how each program loads the weights."""
    target, run = run_dir / "README.md", told.run
    pictures = _validation_images(run_dir, step)
    base = (
        told.base_model_name
        if HUB_ID_PATTERN.fullmatch(told.base_model_name)
        else "lodestones/Chroma1-Base"
    )
    prompt = next((text for _, text in pictures), told.trigger or "a photo")
    repo = run.publishing.hub_model_id or ""
    words = {
        "base": base,
        "place": repo if HUB_ID_PATTERN.fullmatch(repo) else ".",
        "prompt": prompt,
    }
    words = {name: json.dumps(word, ensure_ascii=False) for name, word in words.items()}
    kohya = run.adapter.lora_format == "kohya"
    words["forge"] = (
        "`pytorch_lora_weights.kohya.safetensors`"
        if kohya
        else ("what `simpletuner export pytorch_lora_weights.safetensors --format kohya` writes")
    )
    words["native"] = (
        "`transformer_native.safetensors`"
        if run.publishing.save_native_file
        else (
            "what `simpletuner merge --base transformer --format native --output chroma.safetensors` writes"
        )
    )
    uses_lora = run.model.model_type == "lora"
    kind = f"A {describe_adapter(run.adapter)}" if uses_lora else "A full-rank fine-tune"
    lines = [
        *_front_matter(told, pictures),
        f"# {_escape_markdown(told.title)}",
        "",
        f"{kind} of {_escape_markdown(told.base_model_name)}, {step} steps on {len(told.samples)} pictures.",
        "",
        *(
            [_escape_markdown(run.publishing.model_card_note), ""]
            if run.publishing.model_card_note
            else []
        ),
        *([f"Trigger words: {_inline_code(told.trigger)}", ""] if told.trigger else []),
        *(f"![{_escape_markdown(text)}]({place})" for place, text in pictures),
        "",
        "## Use",
        _usage_section(run).format(**words),
        "## Settings that differ from the defaults",
        "",
        "| option | value |",
        "|---|---|",
        *(
            f"| `{name}` | {_inline_code(json.dumps(value))} |"
            for name, value in _non_default_options(run).items()
        ),
        "",
    ]
    write_atomically(target, "\n".join(lines))
    return target


def _usage_section(run: RunConfig) -> str:
    if run.model.model_type != "lora":
        return FULL_RANK_USAGE
    bundled = run.model.model_flavour == "nano" and run.model.pretrained_model_name_or_path is None
    return (
        NANO_USAGE
        if bundled
        else LYCORIS_USAGE
        if run.adapter.lora_type == "lycoris"
        else LORA_USAGE
    )


def list_card_images(card: Path) -> list[str]:
    """What a card shows, relative to its folder."""
    return re.findall(
        r"^!\[.*\]\((images/[^)]+)\)$", card.read_text(encoding="utf-8"), re.MULTILINE
    )


def _front_matter(told: RunMetadata, pictures: list[tuple[str, str]]) -> list[str]:
    """YAML, written as JSON where text is anybody's: each JSON string is one in YAML."""
    uses_lora, said = told.run.model.model_type == "lora", told.run.publishing
    tags = [
        "text-to-image",
        "chroma",
        "diffusers",
        "simpletuner",
        *(["lora"] if uses_lora else ["full"]),
    ]
    fields: dict[str, Any] = {
        "license": "apache-2.0",
        "pipeline_tag": "text-to-image",
        "library_name": "diffusers",
        "tags": [*tags, *(["safe-for-work"] if said.model_card_safe_for_work else [])],
    }
    if HUB_ID_PATTERN.fullmatch(told.base_model_name):
        fields["base_model"] = told.base_model_name
        fields["base_model_relation"] = "adapter" if uses_lora else "finetune"
    if told.trigger:
        fields["instance_prompt"] = told.trigger
    if pictures:
        fields["widget"] = [{"text": text, "output": {"url": place}} for place, text in pictures]
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())
    return ["---", *lines, "---"]


def _validation_images(run_dir: Path, step: int) -> list[tuple[str, str]]:
    """(relative path, prompt) of the last validation, at full strength."""
    folder = run_dir / "images" / f"step-{step:06d}"
    paths = [path for path in sorted(folder.glob("*.png")) if "-strength-" not in path.name]
    described = [
        (path.relative_to(run_dir).as_posix(), read_image_metadata(path))
        for path in paths[:MAX_CARD_IMAGES]
    ]
    return [(place, found["prompt"]) for place, found in described if found.get("prompt")]


def _non_default_options(run: RunConfig) -> Mapping[str, Any]:
    """Numbers, choices and single words: no free text, no place."""
    values = resolved_options(run)
    chosen = {
        name: (option, values[name])
        for name, option in all_options().items()
        if values[name] is not None
    }
    return {
        name: value
        for name, (option, value) in chosen.items()
        if value != option.default
        and not option.path
        and option.section not in OMITTED_SECTIONS
        and (
            isinstance(value, (bool, int, float))
            or (option.choices and SINGLE_WORD.fullmatch(str(value)))
        )
    }


def _escape_markdown(text: str) -> str:
    """One line that is no markup."""
    return re.sub(r"([\\`*_\[\]<>#|!])", r"\\\1", " ".join(text.split()))


def _inline_code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "/") + "`"
