"""Text files out of a ZIP that strangers made: nothing is unpacked to a disk, and no bomb goes off.

What `zipfile` would read whole, the directory, is measured before; each file comes in pieces, and all
of them together may not be larger than allowed, whatever their headers say.  Names are only shown.
"""

import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import BinaryIO

MOST_ENTRIES = 1000
MOST_DIRECTORY_BYTES = 1024 * 1024
PIECE_BYTES = 64 * 1024

_END = struct.Struct("<4s4H2LH")
_END_MARK, _END64_MARK = b"PK\x05\x06", b"PK\x06\x07"
_LONGEST_COMMENT = 65_535
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, RuntimeError)


class BadArchive(Exception):
    """No ZIP, a broken one, or one that is too large; `str()` says which."""


def text_files(file: BinaryIO) -> list[str]:
    """Names of the text files; those at the top if there are any (folders repeat them step by step)."""
    _check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            names = [entry.filename for entry in archive.infolist() if _is_plain_text(entry)]
    except _BROKEN as error:
        raise BadArchive(f"the ZIP can't be read: {error}") from None
    return [name for name in names if "/" not in name] or names


def read(file: BinaryIO, name: str, take: Callable[[bytes], object], most_bytes: int) -> int:
    """Hand the content of one file to `take`, piece by piece; how many bytes it had.

    Raises `BadArchive` as soon as it is more than `most_bytes`.
    """
    count = 0
    try:
        with zipfile.ZipFile(file) as archive, archive.open(name) as content:
            while piece := content.read(PIECE_BYTES):
                count += len(piece)
                if count > most_bytes:
                    raise BadArchive("the files of the ZIP are too large")
                take(piece)
    except _BROKEN as error:
        raise BadArchive(f"the ZIP can't be read: {error}") from None
    return count


def _is_plain_text(entry: zipfile.ZipInfo) -> bool:
    """Other ways to compress take as much memory as the file says."""
    return entry.filename.endswith(".txt") and entry.compress_type in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    )


def _check_directory(file: BinaryIO) -> None:
    """Is there one, and is it small?  The form with 64 bits is for what we would not take anyway."""
    size = file.seek(0, 2)
    file.seek(max(size - _LONGEST_COMMENT - _END.size - 20, 0))
    last = file.read()
    at = last.rfind(_END_MARK)
    if at < 0 or len(last) - at < _END.size:
        raise BadArchive("this is no ZIP")
    _, _, _, _, entries, directory_bytes, _, _ = _END.unpack_from(last, at)
    if entries > MOST_ENTRIES or directory_bytes > MOST_DIRECTORY_BYTES or _END64_MARK in last[:at][-20:]:
        raise BadArchive("the ZIP has too many files")
