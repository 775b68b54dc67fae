"""The model card: README.md of the run folder, in the form that the Hugging Face Hub shows.

It contains no path, token or name of a machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpletuner.config.load import resolved_options
from simpletuner.config.lycoris_config import describe_adapter
from simpletuner.config.option_catalog import all_options
from simpletuner.config.paths import HUB_ID_PATTERN
from simpletuner.config.schema import RunConfig
from simpletuner.training.model_metadata import RunMetadata, uses_bundled_base
from simpletuner.training.own_files import replace_own_file
from simpletuner.training.target_summary import describe_targets
from simpletuner.validation.validation_images import read_image_metadata

MAX_CARD_IMAGES = 12
# Sections with paths, logging and publishing, which do not describe the training.
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

ComfyUI: put `pytorch_lora_weights.safetensors` into `models/loras` and add the node
"LoraLoaderModelOnly" between the Chroma model and the sampler. Forge: put {forge}
into `models/Lora`.
"""
NANO_USAGE = """
```bash
simpletuner generate --model_flavour nano --lora . --prompt {prompt}
```

The bundled base is a small model for trying things out; other programs cannot load files that were
trained on it.

"""
FULL_RANK_USAGE = """
With diffusers:

```python
import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel

tuned = ChromaTransformer2DModel.from_pretrained(
    {place}, subfolder="transformer", torch_dtype=torch.bfloat16
)
pipe = ChromaPipeline.from_pretrained(
    {base}, transformer=tuned, torch_dtype=torch.bfloat16
).to("cuda")
image = pipe({prompt}, num_inference_steps=28, guidance_scale=3.0).images[0]
```

ComfyUI: put {native} into `models/diffusion_models` and load it with "Load Diffusion Model".
Forge: into `models/Stable-diffusion`.
"""


LYCORIS_USAGE = """
ComfyUI: put `pytorch_lora_weights.safetensors` into `models/loras` and add the node
"LoraLoaderModelOnly" between the Chroma model and the sampler. Forge: put {forge}
into `models/Lora`.

diffusers cannot load LyCORIS files into Chroma. This command writes a LoRA that approximates it,
and reports the error:

```bash
simpletuner export pytorch_lora_weights.safetensors --format diffusers --rank 64
```
"""


def write_model_card(run_dir: Path, metadata: RunMetadata, step: int) -> Path:
    """Write README.md and return its path; one that was edited is moved to earlier-N/.

    It has the front matter for the hub, the images of the last validation, how each program loads
    the weights, and the settings.
    """
    images = _validation_images(run_dir, step)
    prompt = next((text for _, text in images), metadata.trigger or "a photo")
    lines = [
        *_front_matter(metadata, images),
        *_introduction(metadata, step, images),
        "",
        "## Use",
        _usage_section(metadata.run).format(**_usage_values(metadata, prompt)),
        "## Settings that differ from the defaults",
        "",
        "| option | value |",
        "|---|---|",
        *(
            f"| `{name}` | {_inline_code(json.dumps(value))} |"
            for name, value in _non_default_options(metadata.run).items()
        ),
        "",
    ]
    replace_own_file(run_dir, "README.md", "\n".join(lines))
    return run_dir / "README.md"


def _introduction(metadata: RunMetadata, step: int, images: list[tuple[str, str]]) -> list[str]:
    """Return the title, one sentence about the training, the note, and the images."""
    run, rules = metadata.run, metadata.rules
    count = sum(item.sample.dataset not in rules.regularisation for item in metadata.samples)
    targets = describe_targets(run, rules, metadata.samples)
    uses_lora = run.model.model_type == "lora"
    kind = f"A {describe_adapter(run.adapter)}" if uses_lora else "A full-rank fine-tune"
    steps = "1 step" if step == 1 else f"{step} steps"
    image_count = "1 image" if count == 1 else f"{count} images"
    note = run.publishing.model_card_note
    return [
        f"# {_escape_markdown(metadata.title)}",
        "",
        f"{kind} of {_escape_markdown(metadata.base_model_name)}, {steps} on {image_count}.",
        "",
        *([_escape_markdown(note), ""] if note else []),
        *(f"- {_escape_markdown(text)}" for text in targets),
        *([""] if targets else []),
        *([f"Trigger words: {_inline_code(metadata.trigger)}", ""] if metadata.trigger else []),
        *(f"![{_escape_markdown(text)}]({path})" for path, text in images),
    ]


def _usage_values(metadata: RunMetadata, prompt: str) -> dict[str, str]:
    """Return the values for the placeholders of the usage texts."""
    run, base = metadata.run, metadata.base_model_name
    repository = run.publishing.hub_model_id or ""
    json_values = {
        "base": base if HUB_ID_PATTERN.fullmatch(base) else "lodestones/Chroma1-Base",
        "place": repository if HUB_ID_PATTERN.fullmatch(repository) else ".",
        "prompt": prompt,
    }
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in json_values.items()}
    second = second_file(metadata.run_dir)
    if second is not None:
        values["forge"] = f"`{second}`"
    elif run.adapter.lora_type == "lycoris":
        values["forge"] = (
            "the file that `simpletuner export pytorch_lora_weights.safetensors --format kohya` "
            "writes"
        )
    elif run.adapter.use_dora:
        values["forge"] = "nothing: it scales the magnitudes of a DoRA in another way"
    else:
        values["forge"] = (
            "the file that `simpletuner export pytorch_lora_weights.safetensors --format kohya` "
            "writes"
        )
    if run.publishing.save_native_file:
        values["native"] = "`transformer_native.safetensors`"
    else:
        values["native"] = (
            "the file that `simpletuner merge --base transformer --format native "
            "--output chroma.safetensors` writes"
        )
    return values


def second_file(run_dir: Path) -> str | None:
    """Return the name of the LoRA file with native names, if the run wrote one."""
    names = (f"pytorch_lora_weights.{layout}.safetensors" for layout in ("kohya", "comfyui"))
    return next((name for name in names if (run_dir / name).is_file()), None)


def _usage_section(run: RunConfig) -> str:
    if run.model.model_type != "lora":
        return FULL_RANK_USAGE
    return (
        NANO_USAGE
        if uses_bundled_base(run)
        else LYCORIS_USAGE
        if run.adapter.lora_type == "lycoris"
        else LORA_USAGE
    )


def list_card_images(card: Path) -> list[str]:
    """Return the images of a card, relative to its folder."""
    return re.findall(
        r"^!\[.*\]\((images/[^)]+)\)$", card.read_text(encoding="utf-8"), re.MULTILINE
    )


def _front_matter(metadata: RunMetadata, images: list[tuple[str, str]]) -> list[str]:
    """Return the YAML header. Values are written as JSON, which is also valid YAML."""
    uses_lora = metadata.run.model.model_type == "lora"
    is_safe_for_work = metadata.run.publishing.model_card_safe_for_work
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
        "tags": [*tags, *(["safe-for-work"] if is_safe_for_work else [])],
    }
    if HUB_ID_PATTERN.fullmatch(metadata.base_model_name):
        fields["base_model"] = metadata.base_model_name
        fields["base_model_relation"] = "adapter" if uses_lora else "finetune"
    if metadata.trigger:
        fields["instance_prompt"] = metadata.trigger
    if images:
        fields["widget"] = [{"text": text, "output": {"url": path}} for path, text in images]
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())
    return ["---", *lines, "---"]


def _validation_images(run_dir: Path, step: int) -> list[tuple[str, str]]:
    """Return (relative path, prompt) of the images of the last validation, at full strength."""
    folder = run_dir / "images" / f"step-{step:06d}"
    paths = [path for path in sorted(folder.glob("*.png")) if "-strength-" not in path.name]
    described = [
        (path.relative_to(run_dir).as_posix(), read_image_metadata(path))
        for path in paths[:MAX_CARD_IMAGES]
    ]
    return [(path, values["prompt"]) for path, values in described if values.get("prompt")]


def _non_default_options(run: RunConfig) -> Mapping[str, Any]:
    """Return the options that are numbers or choices and not at their default; no text, no path."""
    values = resolved_options(run)
    given = {
        name: (option, values[name])
        for name, option in all_options().items()
        if values[name] is not None
    }
    return {
        name: value
        for name, (option, value) in given.items()
        if value != option.default
        and not option.path
        and option.section not in OMITTED_SECTIONS
        and (
            isinstance(value, (bool, int, float))
            or (option.choices and SINGLE_WORD.fullmatch(str(value)))
        )
    }


def _escape_markdown(text: str) -> str:
    """Return the text as one line without Markdown markup."""
    return re.sub(r"([\\`*_\[\]<>#|!])", r"\\\1", " ".join(text.split()))


def _inline_code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "/") + "`"
