"""ZIPs of strangers: read piece by piece, and refused before they do harm."""

import io
import struct
import zipfile
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from webhook_app import archives
from webhook_app.archives import BadArchive


def zipped(files, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file


def contents(file, most_bytes=10_000_000):
    found = {}
    for name in archives.text_files(file):
        pieces = []
        archives.read(file, name, pieces.append, most_bytes)
        found[name] = b"".join(pieces)
    return found


def test_the_files_at_the_top_are_the_jobs_and_folders_repeat_them():
    file = zipped({"0_build.txt": "b", "build/1_Set up.txt": "s", "1_test.txt": "t", "system.json": "{}"})
    assert contents(file) == {"0_build.txt": b"b", "1_test.txt": b"t"}
    assert contents(zipped({"build/1_a.txt": "a", "build/2_b.txt": "b"})) == {
        "build/1_a.txt": b"a", "build/2_b.txt": b"b",
    }  # fmt: skip
    assert contents(zipped({})) == {}


def test_a_name_that_climbs_is_only_a_name(tmp_path):
    file = zipped({"../../outside.txt": "x", "/etc/passwd.txt": "y"})
    assert contents(file) == {"../../outside.txt": b"x", "/etc/passwd.txt": b"y"}
    assert list(tmp_path.iterdir()) == []


def test_a_bomb_is_left_when_it_is_too_large():
    file = zipped({"0_bomb.txt": b"\0" * 50_000_000})
    assert len(file.getvalue()) < 100_000
    taken = []
    with pytest.raises(BadArchive, match="too large"):
        archives.read(file, "0_bomb.txt", lambda piece: taken.append(len(piece)), 1_000_000)
    assert sum(taken) <= 1_000_000
    assert max(taken) <= archives.PIECE_BYTES


def test_a_bomb_that_lies_about_its_size_brings_no_more_than_it_says():
    raw = bytearray(zipped({"0_bomb.txt": b"\0" * 5_000_000}).getvalue())
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", raw, raw.index(mark) + offset, 10)
    taken = []
    with pytest.raises(BadArchive):
        archives.read(io.BytesIO(raw), "0_bomb.txt", lambda piece: taken.append(len(piece)), 1_000_000)
    assert sum(taken) <= 10


def test_too_many_files_are_refused_before_they_are_listed():
    with pytest.raises(BadArchive, match="too many"):
        archives.text_files(zipped({f"{n}.txt": "" for n in range(archives.MOST_ENTRIES + 1)}))
    with pytest.raises(BadArchive, match="too many"):
        archives.text_files(zipped({f"{n}{'x' * 60_000}.txt": "" for n in range(20)}))


def test_a_directory_with_64_bits_is_refused():
    raw = zipped({"a.txt": "a"}).getvalue()
    end = raw.rindex(b"PK\x05\x06")
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1)
    with pytest.raises(BadArchive, match="too many"):
        archives.text_files(io.BytesIO(raw[:end] + locator + raw[end:]))


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_to_compress_are_not_read(compression):
    assert contents(zipped({"0_a.txt": "a" * 1000}, compression)) == {}


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"<html>", b"\0" * 100_000, b"PK\x05\x06", b"PK\x05\x06" * 50]
)
def test_what_is_no_zip_is_refused(content):
    with pytest.raises(BadArchive):
        archives.text_files(io.BytesIO(content))


@settings(max_examples=200)
@given(st.data())
def test_a_broken_zip_is_read_or_refused(data):
    raw = bytearray(zipped({"0_build.txt": b"hello " * 100, "1_test.txt": b"world"}).getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for content in (raw, raw[:cut]):
        with suppress(BadArchive):
            assert all(len(text) <= 100_000 for text in contents(io.BytesIO(content), 100_000).values())


def test_encrypted_files_are_refused():
    raw = bytearray(zipped({"0_a.txt": "a"}).getvalue())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(mark) + offset] |= 1
    with pytest.raises(BadArchive):
        contents(io.BytesIO(raw))
