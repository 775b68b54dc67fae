"""What comes in: one picture, one caption or one archive of both, looked at before it may stay."""

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
from simpletuner.data.image_files import IGNORED_FILES
from simpletuner.data.rejections import UnusableFile, make_printable
from simpletuner.server.api_errors import DISK_ERROR_ADVICE, ApiError, abort
from simpletuner.server.schemas.datasets import RefusedFile
from simpletuner.server.workspace import PathOutsideWorkspace, Workspace

ACCEPTED_IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff"}
)
ACCEPTED_TYPES_TEXT = (
    "pictures are PNG, JPEG, WebP, AVIF, BMP or TIFF, captions .txt, archives .zip"
)
IMAGE_MAGIC = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|....ftypavi[fs]|....ftypmif1|BM|II[*+]\0|MM\0[*+]",
    re.DOTALL,
)
INCOMING_FOLDER = (
    ".incoming"  # in the dataset's folder, so that a file moves without being copied; never scanned
)
ABANDONED_AFTER_S = 86_400
MIN_FREE_BYTES = 512 << 20  # always left free on the disk
MAX_CAPTION_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 30
MAX_ARCHIVE_LISTING_BYTES = (
    8 << 20
)  # of an archive, held in memory; 20,000 pictures with captions take 3 MB
MAX_ARCHIVE_MEMBERS = 50_000
ENCRYPTED_FLAGS = 0x1 | 0x20 | 0x40  # also patches, which zipfile does not read
MAX_COMPRESSION_RATIO = 200  # pictures hardly shrink; a bomb does
RATIO_EXEMPT_BYTES = 1 << 20  # so little may shrink by any ratio
MAX_REFUSED_LISTED = 500
BLOCK_BYTES = 1 << 20
RESERVED_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def safe_name(name: str) -> str:
    """The name inside the dataset, NFC, folders by "/". Raises Refused: every file system and every program
    can read what is left, and nothing leads out of the folder or hides in it.
    """
    name = unicodedata.normalize("NFC", name)
    for part in name.split("/"):
        if part in ("", ".", "..") or part.startswith("."):
            abort(422, "its name is empty, hidden, absolute or leads out of the folder")
        if any(
            one in '\\:*?"<>|' or unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp")
            for one in part
        ):
            abort(422, 'its name has a control character or one of \\ : * ? " < > |')
        if part != part.strip() or part.endswith(".") or RESERVED_NAMES.fullmatch(part):
            abort(422, "its name ends in a space or dot, or means a device on Windows")
        if len(part.encode()) > 200:
            abort(422, "its name is longer than 200 bytes")
    if name.count("/") > 8 or len(name.encode()) > 1000:
        abort(422, "it lies more than eight folders deep")
    return name


class IncomingUpload:
    """One request's body on its way into an owned dataset's folder: write(), finish(), always discard()."""

    def __init__(self, place: Workspace, folder: Path, name: str, length: int, limit: int) -> None:
        """length: as announced, 0 when not. Raises Refused: 413, 415, 422, 507 before a byte is read."""
        self.workspace, self.folder, self.max_bytes = place, folder, limit
        self.name = safe_name(name)
        self.suffix = Path(self.name).suffix.lower()
        if self.suffix not in ACCEPTED_IMAGE_SUFFIXES | {".txt", ".zip"}:
            abort(
                415, f"{self.suffix or 'a file without suffix'} is not taken; {ACCEPTED_TYPES_TEXT}"
            )
        self.written_bytes = 0
        self._check_limits(length)
        _remove_abandoned(folder / INCOMING_FOLDER)
        self.temp_path = _new_temp_path(folder)
        self.temp_file = self.temp_path.open("xb")

    def write(self, block: bytes) -> None:
        """Raises Refused: 413 above the limit, 507 when the disk is full."""
        self.written_bytes += len(block)
        self._check_limits(len(block))
        self.temp_file.write(block)

    def finish(self) -> tuple[list[str], list[RefusedFile]]:
        """The names that are saved now, and what an archive held that is not taken. Raises Refused for a
        single file, or a whole archive.
        """
        self.temp_file.close()
        if self.suffix == ".zip":
            return unpack_archive(self.workspace, self.temp_path, self.folder)
        return [store_file(self.workspace, self.temp_path, self.folder, self.name)], []

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # what it still holds; a full disk has been told
            self.temp_file.close()
        self.temp_path.unlink(missing_ok=True)

    def _check_limits(self, more: int) -> None:
        if max(self.written_bytes, more) > self.max_bytes:
            abort(
                413,
                f"more than {self.max_bytes} bytes are not taken at once; send an archive in parts",
            )
        if (
            self.written_bytes % (64 * BLOCK_BYTES) < more
            and shutil.disk_usage(self.folder).free < more + MIN_FREE_BYTES
        ):
            abort(507, "there is not enough room on the disk")


def store_file(place: Workspace, part: Path, folder: Path, name: str) -> str:
    """Move a received file to its checked name, if its content is what the name says and nothing is there.

    Never overwrites: the same content counts as saved. Raises Refused.
    """
    (_check_caption if name.lower().endswith(".txt") else _check_image)(part)
    parent, _, last = name.rpartition("/")
    try:  # the last part is not resolved: a link there is a name that is taken
        target = (place.resolve_below(folder, parent) if parent else folder) / last
    except PathOutsideWorkspace as error:
        abort(422, str(error))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        twin = _existing_file(target)
        if twin is None:
            target.open(
                "xb"
            ).close()  # whoever makes the name has it; then the content arrives whole
            os.replace(part, target)
            return name
    except FileExistsError:
        twin = target
    except NotADirectoryError:
        abort(409, "a file has the name of its folder")
    if not twin.is_file() or twin.is_symlink() or not filecmp.cmp(part, twin, shallow=False):
        abort(409, "another file has this name already; rename one of them")
    return name


def _existing_file(target: Path) -> Path | None:
    """The file of the same name, also in the other Unicode spelling."""
    spelled = (target, target.with_name(unicodedata.normalize("NFD", target.name)))
    return next((one for one in spelled if os.path.lexists(one)), None)


def _check_image(part: Path) -> None:
    from simpletuner.data.pixels import read_image_header

    with part.open("rb") as file:
        start = file.read(16)
    if not IMAGE_MAGIC.match(start):
        abort(
            415,
            f"its content is no picture that is taken (it starts with {ascii(start)[1:]}); {ACCEPTED_TYPES_TEXT}",
        )
    try:
        read_image_header(part, DataOptions().max_image_megapixels)
    except UnusableFile as error:
        abort(415, str(error))


def _check_caption(part: Path) -> None:
    if part.stat().st_size > MAX_CAPTION_BYTES:
        abort(413, f"a caption is at most {MAX_CAPTION_BYTES} bytes")
    text = part.read_bytes()
    try:
        text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        abort(415, f"a caption is UTF-8; this is not, at byte {error.start + 1}")
    if b"\0" in text:
        abort(415, "it has zero bytes (UTF-16?); save it as UTF-8")


class _BoundedArchive:
    """An archive's file that is never read in pieces of more than DIRECTORY_BYTES: zipfile reads the whole
    list of members at once, whatever length the archive claims for it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(
            MAX_ARCHIVE_LISTING_BYTES + 1 if size < 0 else min(size, MAX_ARCHIVE_LISTING_BYTES + 1)
        )
        if len(data) > MAX_ARCHIVE_LISTING_BYTES:
            raise zipfile.BadZipFile("its list of files is too long")
        return data


def unpack_archive(
    place: Workspace, part: Path, folder: Path
) -> tuple[list[str], list[RefusedFile]]:
    """Every picture and caption of an archive, folders kept. Raises Refused: no archive, a bomb."""
    saved: list[str] = []
    refused: list[RefusedFile] = []
    hidden = 0
    try:
        with part.open("rb") as raw, zipfile.ZipFile(_BoundedArchive(raw)) as archive:
            members = [one for one in archive.infolist() if not one.is_dir()]
            _check_archive(
                members, part.stat().st_size, shutil.disk_usage(folder).free - MIN_FREE_BYTES
            )
            for member in members:
                name = _member_name(member)
                if _is_ignored(name.split("/")):
                    continue
                try:
                    saved.append(_unpack_member(place, archive, member, safe_name(name), folder))
                except ApiError as error:
                    hidden += len(refused) >= MAX_REFUSED_LISTED
                    if len(refused) < MAX_REFUSED_LISTED:
                        refused.append(
                            RefusedFile(file=make_printable(name)[:300], reason=str(error))
                        )
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, struct.error, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERROR_ADVICE:
            raise
        abort(415, f"this is no archive that can be read: {error}")
    if hidden:
        refused.append(RefusedFile(file=f"{hidden} more", reason="not named one by one"))
    return list(dict.fromkeys(saved)), refused


def _check_archive(members: list[zipfile.ZipInfo], size: int, room: int) -> None:
    total = sum(one.file_size for one in members)
    if len(members) > MAX_ARCHIVE_MEMBERS:
        abort(
            413, f"an archive has at most {MAX_ARCHIVE_MEMBERS} files; this one has {len(members)}"
        )
    if total > max(RATIO_EXEMPT_BYTES * 64, MAX_COMPRESSION_RATIO * size):
        abort(413, f"{size} bytes that unpack to {total}: this is no archive of pictures")
    if total > room:
        abort(507, "there is not enough room on the disk to unpack it")


def _member_name(member: zipfile.ZipInfo) -> str:
    """Its name; macOS writes UTF-8 without saying so, old Windows programs write backslashes."""
    name = member.orig_filename
    if not member.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _is_ignored(parts: list[str]) -> bool:
    dotted = any(part.startswith(".") and part.strip(".") for part in parts)
    return parts[0] == "__MACOSX" or dotted or parts[-1] in IGNORED_FILES


def _unpack_member(
    place: Workspace, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, folder: Path
) -> str:
    suffix = Path(name).suffix.lower()
    mode = member.external_attr >> 16
    most = MAX_CAPTION_BYTES if suffix == ".txt" else MAX_IMAGE_BYTES
    problems = {
        f"{suffix or 'a file without suffix'} is not taken; {ACCEPTED_TYPES_TEXT}": suffix
        not in ACCEPTED_IMAGE_SUFFIXES | {".txt"},
        "it is encrypted": bool(member.flag_bits & ENCRYPTED_FLAGS),
        "it is a link or a device": stat.S_IFMT(mode) not in (0, stat.S_IFREG),
        "its compression is not read; use Deflate": member.compress_type
        not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
        f"it is larger than {most} bytes": member.file_size > most,
        "it shrinks more than a picture can": member.file_size
        > max(RATIO_EXEMPT_BYTES, MAX_COMPRESSION_RATIO * member.compress_size),
    }
    for problem, applies in problems.items():
        if applies:
            abort(415, problem)
    part = _new_temp_path(folder)
    try:
        with archive.open(member) as source, part.open("xb") as file:
            shutil.copyfileobj(source, file, BLOCK_BYTES)
        return store_file(place, part, folder, name)
    except (
        zipfile.BadZipFile,
        EOFError,
        ValueError,
        RuntimeError,
        zlib.error,
        struct.error,
    ) as error:
        abort(415, f"it is damaged: {error}")
    finally:
        part.unlink(missing_ok=True)


def _new_temp_path(folder: Path) -> Path:
    (folder / INCOMING_FOLDER).mkdir(exist_ok=True)
    return folder / INCOMING_FOLDER / secrets.token_hex(8)


def _remove_abandoned(incoming: Path) -> None:
    """Remove what an upload left that was cut off by the end of its server."""
    with contextlib.suppress(FileNotFoundError):
        for path in incoming.iterdir():
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                path.unlink(missing_ok=True)
