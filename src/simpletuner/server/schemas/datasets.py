"""Pictures and captions."""

from __future__ import annotations

from simpletuner.server.schemas.base import ApiModel


class DatasetInfo(ApiModel):
    """owned: lies in the workspace's datasets folder, so that files may be added. Every picture is captioned,
    uncaptioned, refused (cannot be trained on) or unread: its header is still to be read, ask again.
    problem: why the folder cannot be read at all.
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


class DatasetRequest(ApiModel):
    """path: an existing folder under an allowed root; None makes a folder in the workspace."""

    name: str
    path: str | None = None


class RefusedFile(ApiModel):
    file: str
    reason: str


class UploadResult(ApiModel):
    """What one upload came to. An archive saves many and may have refused some (the first few hundred are
    named); a single file that is refused is an answer of its own. A file that was there already, with the
    same content, counts as saved.
    """

    saved: list[str]
    refused: list[RefusedFile]


class DatasetItem(ApiModel):
    """One picture. bucket_px (width, height) and crop_px (left, top, width, height in the picture's own
    pixels) say how it would be trained; None for a refused file. caption_text: of the .txt file, None where
    there is none or it is not UTF-8; captions: its alternatives.
    """

    file: str
    width_px: int
    height_px: int
    captions: list[str]
    caption_text: str | None
    refused: str | None
    bucket_px: tuple[int, int] | None
    crop_px: tuple[int, int, int, int] | None


class DatasetItemPage(ApiModel):
    """One page. total: pictures that match; while unread is not 0 more may come to match."""

    total: int
    offset: int
    items: list[DatasetItem]
    unread: int = 0


class BucketCount(ApiModel):
    width_px: int
    height_px: int
    pictures: int


class CaptionWrite(ApiModel):
    """text: "" removes the file. before: the caption_text that the writer saw; another text there now
    answers 409.
    """

    text: str
    before: str | None


class FolderListing(ApiModel):
    """folders: absolute paths of the folders in it. path "": those that may be looked into at all.
    pictures: files in this very folder that are named as pictures.
    """

    path: str
    folders: list[str]
    pictures: int
