"""Messages about the inspection of a dataset, which `simpletuner inspect` does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from simpletuner.server.schemas.base import ApiModel, Message
from simpletuner.server.schemas.jobs import Job


class InspectionRequest(ApiModel):
    """The subject of an inspection.

    trigger: the text that should be in every caption, "" for none. The other fields are those of a
    dataset; buckets and enlarged images follow from them.
    """

    trigger: str = Field(default="", max_length=200, pattern=r"^[^\x00-\x1f]*$")
    resolution: float = Field(default=1024, gt=0, le=16384)
    resolution_type: Literal["pixel", "area", "pixel_area"] = "pixel_area"
    crop: bool = True
    crop_aspect: Literal["square", "preserve", "closest"] = "preserve"


class CountedText(ApiModel):
    """A tag, a phrase or a whole caption, and the number of captions or images with it."""

    text: str
    count: int
    files: list[str] = Field(default_factory=list)


class InspectedBucket(ApiModel):
    """A bucket. cropped: mean fraction of the resized images that is cropped away."""

    width_px: int
    height_px: int
    images: int
    cropped: float


class MeasuredFile(ApiModel):
    """A number about one image."""

    file: str
    value: float


class InspectionFinding(ApiModel):
    """A warning or a note, with what to do about it."""

    level: Literal["warning", "note"]
    code: str
    message: Message
    advice: Message
    files: list[str]


class CaptionLengths(ApiModel):
    """Lengths of the captions, in words or tokens. over_limit: captions that are cut off."""

    shortest: int
    median: float
    longest: int
    over_limit: int | None


class TriggerCount(ApiModel):
    """Images with the trigger in a caption. missing: some of those without it."""

    trigger: str
    images: int
    missing: list[str]


class InspectionResult(ApiModel):
    """The statistics of a dataset, as `simpletuner inspect` prints them.

    Sizes are (width, height) in px. enlarged: factor of the side. blurred: standard deviation of
    the blur in px at the size of training. identical, near: groups of files that are the same, or
    look the same. Long lists are cut; *_count is of the whole list.
    """

    images: int
    rejected_count: int
    smallest_px: tuple[int, int]
    median_px: tuple[int, int]
    largest_px: tuple[int, int]
    buckets: list[InspectedBucket]
    captions: int
    uncaptioned: int
    words: CaptionLengths
    tokens: CaptionLengths
    tags: list[CountedText]
    phrases: list[CountedText]
    equal_captions: list[CountedText]
    trigger: TriggerCount | None
    enlarged_count: int
    enlarged: list[MeasuredFile]
    blurred_count: int
    blurred: list[MeasuredFile]
    blank: list[str]
    damaged: list[str]
    identical_count: int
    identical: list[list[str]]
    near_count: int
    near: list[list[str]]
    findings: list[InspectionFinding]


class Inspection(ApiModel):
    """The newest inspection of a dataset.

    job: the newest job, None if there was none. made_t: unix seconds of the result, None without
    one. request: what the result was made for.
    """

    job: Job | None
    made_t: float | None
    request: InspectionRequest | None
    result: InspectionResult | None
