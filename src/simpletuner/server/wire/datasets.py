"""Pictures and captions."""

from __future__ import annotations

from simpletuner.server.wire.base import Wire


class DatasetInfo(Wire):
    """owned: made by this server, so that files may be added. refused: files that cannot be trained on."""

    name: str
    path: str
    owned: bool
    pictures: int
    captioned: int
    refused: int
    size_bytes: int


class DatasetAsk(Wire):
    """path: an existing folder under an allowed root; None makes a folder in the workspace."""

    name: str
    path: str | None = None


class RefusedFile(Wire):
    file: str
    reason: str


class Uploaded(Wire):
    """What one upload came to: an archive saves many."""

    saved: list[str]
    refused: list[RefusedFile]
    dataset: DatasetInfo


class Item(Wire):
    """One picture. bucket_px (width, height) and crop_px (left, top, width, height in the picture's own
    pixels) say how it would be trained; None for a refused file."""

    file: str
    width_px: int
    height_px: int
    captions: list[str]
    caption_text: str | None
    refused: str | None
    bucket_px: tuple[int, int] | None
    crop_px: tuple[int, int, int, int] | None


class Items(Wire):
    total: int
    offset: int
    items: list[Item]


class Bucket(Wire):
    width_px: int
    height_px: int
    pictures: int


class CaptionWrite(Wire):
    """before: the text that the writer saw, None for no file; another text there now answers 409."""

    text: str
    before: str | None


class Folder(Wire):
    path: str
    folders: list[str]
    pictures: int
