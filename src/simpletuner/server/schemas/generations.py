"""Messages about generated images, LoRA files, and captions by a model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from simpletuner.server.schemas.base import ApiModel
from simpletuner.server.schemas.jobs import Job

PromptText = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000)]
Strength = Annotated[float, Field(ge=-10, le=10)]


class GenerationRequest(ApiModel):
    """Images to generate.

    flavour: the base, "" for that of the LoRA's run. lora: path of a LoRA file, a checkpoint or a
    run in the workspace, "" for none. strengths: one image each. count: images per prompt, with
    consecutive seeds. image: a path to start from, "" for noise; denoise: the part of it that is
    replaced; mask: a path of an image that is white where `image` is kept. group: joins the
    generations of one grid.
    """

    prompts: list[PromptText] = Field(min_length=1, max_length=16)
    negative_prompt: str = Field(default="", max_length=4000)
    flavour: Literal["", "base", "hd", "flash", "nano"] = ""
    precision: Literal["", "no_change", "int8", "int4", "nf4", "fp8"] = ""
    lora: str = ""
    strengths: list[Strength] = Field(default_factory=lambda: [1.0], min_length=1, max_length=9)
    steps: int = Field(default=20, ge=1, le=200)
    guidance: float = Field(default=1.0, ge=1, le=20)
    seed: int = Field(default=42, ge=0, lt=2**32)
    count: int = Field(default=1, ge=1, le=16)
    size: str = Field(default="", pattern=r"^(\d{2,4}(x\d{2,4})?)?$")
    image: str = ""
    denoise: float = Field(default=0.5, ge=0, le=1)
    mask: str = ""
    invert_mask: bool = False
    group: str = Field(default="", pattern=r"^[0-9a-f]{0,12}$")


class GeneratedImage(ApiModel):
    """One generated image. file: relative to the generation's folder. strength: None if unknown."""

    file: str
    path: str
    prompt: str
    seed: int | None
    strength: float | None
    width_px: int
    height_px: int


class Generation(ApiModel):
    """A request with its job and the images so far.

    job: None once the job was removed. preview: changes with the rough preview of the images that
    are being sampled, None without one.
    """

    id: str
    created_t: float
    request: GenerationRequest
    job: Job | None
    images: list[GeneratedImage]
    preview: int | None


class LoraInfo(ApiModel):
    """A LoRA file in the workspace.

    path: for other requests. run: the run that it comes from, "" for another file. step: None for
    a file that is not a checkpoint's.
    """

    path: str
    name: str
    run: str
    run_name: str
    step: int | None
    flavour: str
    size_bytes: int
    changed_t: float
    removable: bool


class LoraPart(ApiModel):
    """A LoRA of a sum, with its weight."""

    path: str
    weight: Strength = 1.0


class LoraExportRequest(ApiModel):
    """A LoRA file to write from others: a conversion of one, or a weighted sum of several.

    action "check": write nothing, report how each program loads the first. "merge": write a whole
    model. name: of the new file in the folder loras/. rank: reduce to this rank.
    """

    action: Literal["export", "check", "merge"] = "export"
    parts: list[LoraPart] = Field(min_length=1, max_length=8)
    name: str = Field(default="", pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]{0,63})?$")
    format: Literal["", "diffusers", "kohya", "comfyui"] = ""
    rank: int | None = Field(default=None, ge=1, le=1024)
