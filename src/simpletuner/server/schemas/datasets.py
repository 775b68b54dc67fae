"""Messages about datasets: images, captions, buckets, uploads."""

from __future__ import annotations

from pydantic import Field

from simpletuner.server.schemas.base import ApiModel, Message


class DatasetInfo(ApiModel):
    """One dataset with its counts.

    owned: the folder is in the workspace's datasets folder, so files can be uploaded to it. Every
    image is captioned, uncaptioned, refused (it cannot be trained on), excluded (the user leaves it
    out) or unread (its header has not been read yet; request the dataset again). `pictures`: number
    of images. problem: why the folder cannot be read.
    """

    name: str
    path: str
    owned: bool
    pictures: int
    captioned: int
    refused: int
    size_bytes: int
    unread: int = 0
    problem: str = ""
    excluded: int = 0


class DatasetRequest(ApiModel):
    """A dataset to create.

    path: an existing folder under an allowed root; None creates a new folder.
    """

    name: str
    path: str | None = None


class RefusedFile(ApiModel):
    """A file of an archive that was not stored."""

    file: str
    reason: Message


class UploadResult(ApiModel):
    """Result of one upload.

    An archive can save many files and refuse others, of which the first few hundred are listed. A
    single file that is refused is an error response instead. A file that already exists with the
    same content counts as saved.
    """

    saved: list[str]
    refused: list[RefusedFile]


class DatasetItem(ApiModel):
    """One image of a dataset.

    bucket_px: (width, height) that it is resized and cropped to. crop_px: (left, top, width,
    height) of the crop in the original's pixels. Both are None for a refused file. caption_text:
    content of the .txt file, None if there is none or it is not UTF-8. captions: its alternative
    captions. excluded: the user leaves it out. crop_box: (left, top, width, height) of the part
    that is used as if it were the whole image, None for all of it.
    """

    file: str
    width_px: int
    height_px: int
    captions: list[str]
    caption_text: str | None
    refused: str | None
    bucket_px: tuple[int, int] | None
    crop_px: tuple[int, int, int, int] | None
    excluded: bool = False
    crop_box: tuple[int, int, int, int] | None = None


class DatasetItemPage(ApiModel):
    """One page of images.

    total: number of matching images, which can grow while `unread` is not 0.
    """

    total: int
    offset: int
    items: list[DatasetItem]
    unread: int = 0


class BucketCount(ApiModel):
    """Number of images in a bucket (`pictures`)."""

    width_px: int
    height_px: int
    pictures: int


class DatasetFindings(ApiModel):
    """Images of a dataset that a person should look at.

    duplicates: groups of files with the same content. small: files whose shorter edge is less than
    small_px.
    """

    duplicates: list[list[str]]
    small: list[str]
    small_px: int


class CaptionWrite(ApiModel):
    """A caption to write.

    text: "" removes the file. before: the caption_text that the change is based on; if the file
    holds another text by then, the response is 409.
    """

    text: str
    before: str | None


class FolderListing(ApiModel):
    """The content of a folder.

    folders: absolute paths of its subfolders; for path "", the allowed roots. `pictures`: number of
    files directly in this folder that have the suffix of an image.
    """

    path: str
    folders: list[str]
    pictures: int


class DatasetRename(ApiModel):
    """A new name for a dataset."""

    name: str


class ImageSelection(ApiModel):
    """Some images of a dataset."""

    files: list[str] = Field(min_length=1, max_length=10_000)


class ExclusionWrite(ApiModel):
    """Images to leave out of later runs, or to use again (excluded: false)."""

    files: list[str] = Field(min_length=1, max_length=10_000)
    excluded: bool


class CropBoxWrite(ApiModel):
    """A part of an image, (left, top, width, height) in px of the upright image; None for all."""

    box: tuple[int, int, int, int] | None
