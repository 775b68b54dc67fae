"""Uploads of an image, a caption or an archive of both, validated before they are stored."""

from __future__ import annotations

import contextlib
import filecmp
import os
import re
import secrets
import shutil
import stat
import struct
import time
import unicodedata
import zipfile
import zlib
from pathlib import Path
from typing import IO

from simpletuner.config.schema import DataOptions
from simpletuner.data.rejections import UnusableFile, make_printable
from simpletuner.data.sources import IGNORED_FILES
from simpletuner.server.api_errors import (
    DISK_ERROR_ADVICE,
    ApiError,
    abort,
)
from simpletuner.server.schemas.base import UNSHOWN_CHARACTERS
from simpletuner.server.schemas.datasets import RefusedFile
from simpletuner.server.workspace import PathOutsideWorkspace, Workspace

ACCEPTED_IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff"}
)
ACCEPTED_TYPES_TEXT = (
    "allowed are PNG, JPEG, WebP, AVIF, BMP and TIFF images, .txt captions and .zip archives"
)
IMAGE_MAGIC = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|....ftypavi[fs]|....ftypmif1"
    rb"|BM|II[*+]\0|MM\0[*+]",
    re.DOTALL,
)
OTHER_CONTENT: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"(?i)\s*<(!doctype|html)"), "a web page, not an image"),
    (re.compile(rb"(?i)\s*<(\?xml|svg)"), "an SVG drawing"),
    (re.compile(rb"GIF8[79]a"), "a GIF"),
    (re.compile(rb"(?s)....ftyp(heic|heix|hevc|mif1|msf1)"), "a HEIC photo; export it as JPEG"),
    (re.compile(rb"8BPS"), "a Photoshop document"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"PK\x03\x04"), "a zip archive with the suffix of an image"),
    (re.compile(rb"[\t\n\r\x20-\x7e]+\Z"), "text, not an image"),
)
# In the dataset's folder, so that a file can be moved without copying; never scanned for images.
INCOMING_FOLDER = ".incoming"
ABANDONED_AFTER_S = 86_400
MIN_FREE_BYTES = 512 << 20  # space that must remain free on the disk
MAX_CAPTION_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 30
# Limit of the list of members, which is read into memory; 20,000 images with captions take 3 MB.
MAX_ARCHIVE_LISTING_BYTES = 8 << 20
MAX_ARCHIVE_MEMBERS = 50_000
ENCRYPTED_FLAGS = (
    0x1 | 0x20 | 0x40
)  # encryption, patch data (which zipfile cannot read), strong encryption
MAX_COMPRESSION_RATIO = 200  # images hardly compress; a zip bomb does
RATIO_EXEMPT_BYTES = 1 << 20  # files up to this size may have any compression ratio
MAX_REFUSED_LISTED = 500
BLOCK_BYTES = 1 << 20
RESERVED_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def safe_name(name: str) -> str:
    """Return a file name inside the dataset, Unicode NFC, with "/" between folders.

    Raises ApiError 422 for a name that some file system or program cannot read, that is hidden, or
    that leads out of the folder.
    """
    name = unicodedata.normalize("NFC", name)
    for part in name.split("/"):
        if part in ("", ".", "..") or part.startswith("."):
            abort(422, "the name is empty, hidden, absolute or leads out of the folder")
        if any(char in '\\:*?"<>|\t\n' or UNSHOWN_CHARACTERS.match(char) for char in part):
            abort(
                422,
                'the name has a hidden character or one of \\ : * ? " < > |',
            )
        if part != part.strip() or part.endswith(".") or RESERVED_NAMES.fullmatch(part):
            abort(
                422,
                "the name starts or ends with a space, ends with a dot, or is reserved on Windows",
            )
        if len(part.encode()) > 200:
            abort(422, "the name is longer than 200 bytes")
    if name.count("/") > 8 or len(name.encode()) > 1000:
        abort(422, "the path has more than eight folders or 1000 bytes")
    return name


class IncomingUpload:
    """An upload into an owned dataset: call write() repeatedly, finish(), and always discard()."""

    def __init__(
        self, workspace: Workspace, folder: Path, name: str, length: int, limit: int
    ) -> None:
        """length: declared length in bytes, or 0. Raises ApiError 413, 415, 422 or 507."""
        self.workspace = workspace
        self.folder = folder
        self.max_bytes = limit
        self.name = safe_name(name)
        self.suffix = Path(self.name).suffix.lower()
        if self.suffix not in ACCEPTED_IMAGE_SUFFIXES | {".txt", ".zip"}:
            abort(415, f"{_describe_suffix(self.suffix)} cannot be uploaded; {ACCEPTED_TYPES_TEXT}")
        self.written_bytes = 0
        self._check_limits(length)
        _remove_abandoned(folder / INCOMING_FOLDER)
        self.temp_path = _new_temp_path(folder)
        self.temp_file = self.temp_path.open("xb")

    def write(self, block: bytes) -> None:
        """Append a block. Raises ApiError: 413 above the size limit, 507 if the disk is full."""
        self.written_bytes += len(block)
        self._check_limits(len(block))
        self.temp_file.write(block)

    def finish(self) -> tuple[list[str], list[RefusedFile]]:
        """Store the upload; return the saved names, and the refused files of an archive.

        Raises ApiError if the single file, or the archive as a whole, is refused.
        """
        self.temp_file.close()
        if self.suffix == ".zip":
            return unpack_archive(self.workspace, self.temp_path, self.folder)
        return [store_file(self.workspace, self.temp_path, self.folder, self.name)], []

    def discard(self) -> None:
        """Delete the temporary file."""
        with contextlib.suppress(
            OSError
        ):  # flushing can fail on a full disk, which was already reported
            self.temp_file.close()
        self.temp_path.unlink(missing_ok=True)

    def _check_limits(self, added_bytes: int) -> None:
        if max(self.written_bytes, added_bytes) > self.max_bytes:
            abort(
                413,
                f"one upload can have at most {self.max_bytes} bytes; split the archive into parts",
            )
        if (
            self.written_bytes % (64 * BLOCK_BYTES) < added_bytes
            and shutil.disk_usage(self.folder).free < added_bytes + MIN_FREE_BYTES
        ):
            abort(507, "there is not enough free disk space")


def store_file(workspace: Workspace, part: Path, folder: Path, name: str) -> str:
    """Move a received file to its final name, after checking that its content matches the suffix.

    An existing file is never overwritten; if it has the same content, the upload counts as saved.
    Raises ApiError.
    """
    (_check_caption if name.lower().endswith(".txt") else _check_image)(part)
    parent, _, last = name.rpartition("/")
    try:  # the last part is not resolved: a link with this name counts as an existing file
        target = (workspace.resolve_below(folder, parent) if parent else folder) / last
    except PathOutsideWorkspace as error:
        abort(422, str(error))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        existing = _existing_file(target)
        if existing is None:
            # Reserve the name atomically, then replace the empty file by the complete one.
            target.open("xb").close()
            os.replace(part, target)
            return name
    except FileExistsError:
        existing = target
    except NotADirectoryError:
        abort(409, "a file already has the name of its folder")
    is_same = (
        existing.is_file()
        and not existing.is_symlink()
        and filecmp.cmp(part, existing, shallow=False)
    )
    if not is_same:
        abort(409, "another file already has this name; rename one of them")
    return name


def _existing_file(target: Path) -> Path | None:
    """Return the existing file of this name, in either Unicode normal form."""
    candidates = (target, target.with_name(unicodedata.normalize("NFD", target.name)))
    return next((path for path in candidates if os.path.lexists(path)), None)


def _check_image(part: Path) -> None:
    from simpletuner.data.pixels import read_image_header
    from simpletuner.data.sources import LocalFile

    with part.open("rb") as file:
        start = file.read(64)
    if not IMAGE_MAGIC.match(start):
        abort(415, f"this file is {describe_content(start)}; {ACCEPTED_TYPES_TEXT}")
    try:
        read_image_header(LocalFile(part), DataOptions().max_image_megapixels)
    except UnusableFile as error:
        abort(415, str(error))


def describe_content(start: bytes) -> str:
    """Return the kind of content of a file that is not an image, from its first 64 bytes."""
    for pattern, name in OTHER_CONTENT:
        if pattern.match(start):
            return name
    return "damaged, or not an image" if start else "empty"


def _check_caption(part: Path) -> None:
    if part.stat().st_size > MAX_CAPTION_BYTES:
        abort(413, f"a caption can have at most {MAX_CAPTION_BYTES} bytes")
    text = part.read_bytes()
    try:
        text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        abort(415, f"a caption must be UTF-8; byte {error.start + 1} of this file is not")
    if b"\0" in text:
        abort(415, "the caption contains zero bytes (UTF-16?); save it as UTF-8")


class _BoundedArchive:
    """The file of an archive, which limits each read to MAX_ARCHIVE_LISTING_BYTES.

    zipfile reads the whole list of members at once, whatever length the archive declares for it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(
            MAX_ARCHIVE_LISTING_BYTES + 1 if size < 0 else min(size, MAX_ARCHIVE_LISTING_BYTES + 1)
        )
        if len(data) > MAX_ARCHIVE_LISTING_BYTES:
            raise zipfile.BadZipFile("the list of files is too long")
        return data


def unpack_archive(
    workspace: Workspace, part: Path, folder: Path
) -> tuple[list[str], list[RefusedFile]]:
    """Store all images and captions of an archive in their folders; return saved and refused files.

    Raises ApiError for a damaged archive or a zip bomb.
    """
    saved: list[str] = []
    refused: list[RefusedFile] = []
    hidden = 0
    try:
        with part.open("rb") as raw, zipfile.ZipFile(_BoundedArchive(raw)) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            _check_archive(
                members, part.stat().st_size, shutil.disk_usage(folder).free - MIN_FREE_BYTES
            )
            for member in members:
                name = _member_name(member)
                if _is_ignored(name.split("/")):
                    continue
                try:
                    saved.append(
                        _unpack_member(workspace, archive, member, safe_name(name), folder)
                    )
                except ApiError as error:
                    hidden += len(refused) >= MAX_REFUSED_LISTED
                    if len(refused) < MAX_REFUSED_LISTED:
                        refused.append(
                            RefusedFile(file=make_printable(name)[:300], reason=str(error))
                        )
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, struct.error, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERROR_ADVICE:
            raise
        abort(415, f"the archive cannot be read: {error}")
    if hidden:
        refused.append(RefusedFile(file=f"{hidden} more", reason="not listed"))
    return list(dict.fromkeys(saved)), refused


def _check_archive(members: list[zipfile.ZipInfo], size: int, free_bytes: int) -> None:
    total = sum(member.file_size for member in members)
    if len(members) > MAX_ARCHIVE_MEMBERS:
        abort(
            413,
            f"an archive can have at most {MAX_ARCHIVE_MEMBERS} files; this one has {len(members)}",
        )
    if total > max(RATIO_EXEMPT_BYTES * 64, MAX_COMPRESSION_RATIO * size):
        abort(413, f"{size} bytes would unpack to {total}; this is not an archive of images")
    if total > free_bytes:
        abort(507, "there is not enough free disk space to unpack the archive")


def _member_name(member: zipfile.ZipInfo) -> str:
    """Return a member's name with "/" between folders.

    macOS writes UTF-8 without setting the flag for it; old Windows programs write backslashes.
    """
    name = member.orig_filename
    if not member.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _is_ignored(parts: list[str]) -> bool:
    dotted = any(part.startswith(".") and part.strip(".") for part in parts)
    return parts[0] == "__MACOSX" or dotted or parts[-1] in IGNORED_FILES


def _unpack_member(
    workspace: Workspace, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, folder: Path
) -> str:
    suffix = Path(name).suffix.lower()
    mode = member.external_attr >> 16
    max_bytes = MAX_CAPTION_BYTES if suffix == ".txt" else MAX_IMAGE_BYTES
    problems = {
        f"{_describe_suffix(suffix)} cannot be uploaded; {ACCEPTED_TYPES_TEXT}": suffix
        not in ACCEPTED_IMAGE_SUFFIXES | {".txt"},
        "the file is encrypted": bool(member.flag_bits & ENCRYPTED_FLAGS),
        "the file is a link or a device": stat.S_IFMT(mode) not in (0, stat.S_IFREG),
        "its compression method is not supported; use Deflate": member.compress_type
        not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
        f"the file is larger than {max_bytes} bytes": member.file_size > max_bytes,
        "its compression ratio is higher than that of any image": member.file_size
        > max(RATIO_EXEMPT_BYTES, MAX_COMPRESSION_RATIO * member.compress_size),
    }
    for problem, applies in problems.items():
        if applies:
            abort(415, problem)
    part = _new_temp_path(folder)
    try:
        with archive.open(member) as source, part.open("xb") as file:
            shutil.copyfileobj(source, file, BLOCK_BYTES)
        return store_file(workspace, part, folder, name)
    except (
        zipfile.BadZipFile,
        EOFError,
        ValueError,
        RuntimeError,
        zlib.error,
        struct.error,
    ) as error:
        abort(415, f"the file is damaged: {error}")
    finally:
        part.unlink(missing_ok=True)


def _describe_suffix(suffix: str) -> str:
    return f"a {suffix} file" if suffix else "a file without suffix"


def _new_temp_path(folder: Path) -> Path:
    (folder / INCOMING_FOLDER).mkdir(exist_ok=True)
    return folder / INCOMING_FOLDER / secrets.token_hex(8)


def _remove_abandoned(incoming: Path) -> None:
    """Delete temporary files of uploads that were interrupted when a server ended."""
    with contextlib.suppress(FileNotFoundError):
        for path in incoming.iterdir():
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                path.unlink(missing_ok=True)
