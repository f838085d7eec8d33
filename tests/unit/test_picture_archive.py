"""Archives give plain files with plain names, whatever else is in them, and never more than asked."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import ArchiveInvalid, ImageError, LeaseLost
from tests.datasets import jpeg
from workers.training.data_report import EntryTally
from workers.training.picture_archive import Entry, plain_name, read_entries

KINDS = ("tar", "tar.gz", "zip")
MAX_BYTES = 1 << 20

Members = list[tuple[str, bytes]]


def pack(path: Path, members: Members, kind: str) -> Path:
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(zipfile.ZipInfo(name), content)
        return path
    with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def entries(
    path: Path,
    wanted: Callable[[str], bool] = lambda name: True,
    tally: EntryTally | None = None,
    keep_going: Callable[[], None] = lambda: None,
) -> list[Entry]:
    refused = EntryTally() if tally is None else tally
    return list(
        read_entries(path, wanted, max_bytes=MAX_BYTES, refused=refused, keep_going=keep_going)
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "content"


@pytest.mark.parametrize("kind", KINDS)
def test_wanted_members_are_read_and_others_are_not(path: Path, kind: str) -> None:
    pack(path, [("a/1.jpg", b"one"), ("a/2.jpg", b"two"), ("./图/3.jpg", b"three")], kind)
    found = entries(path, lambda name: name != "a/2.jpg")
    assert found == [("a/1.jpg", b"one"), ("图/3.jpg", b"three")]


HOSTILE = {
    "../up.jpg": "parent_path",
    "a/../../up.jpg": "parent_path",
    "/etc/passwd": "absolute_path",
    "C:/windows.jpg": "absolute_path",
    "..\\up.jpg": "parent_path",
    "d/" * 100 + "x.jpg": "invalid_name",
    "x" * 5000: "invalid_name",
    ".": "invalid_name",
}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_are_refused_one_by_one(tmp_path: Path, path: Path, kind: str) -> None:
    pack(path, [*((name, b"x") for name in HOSTILE), ("good.jpg", b"good")], kind)
    before = set(tmp_path.rglob("*"))
    tally = EntryTally()
    assert entries(path, tally=tally) == [("good.jpg", b"good")]
    reasons = list(HOSTILE.values())
    assert dict(tally.counts) == {reason: reasons.count(reason) for reason in set(reasons)}
    assert [entry.reason for entry in tally.first] == reasons
    assert set(tmp_path.rglob("*")) == before


def test_links_devices_and_pipes_are_refused(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, kind in [
            ("s.jpg", tarfile.SYMTYPE),
            ("h.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.CHRTYPE),
            ("f.jpg", tarfile.FIFOTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type = kind
            member.linkname = "/etc/passwd"
            archive.addfile(member)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    tally = EntryTally()
    assert entries(path, tally=tally) == []
    assert dict(tally.counts) == {"link": 2, "not_a_file": 2}


def test_links_in_a_zip_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("s.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("folder/", "")
    tally = EntryTally()
    assert entries(path, tally=tally) == []
    assert dict(tally.counts) == {"link": 1}


def test_encrypted_and_oddly_compressed_members_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("odd.jpg", b"x" * 100, zipfile.ZIP_LZMA)
        archive.writestr("locked.jpg", b"x")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4) + 8] |= 1
    path.write_bytes(data)
    tally = EntryTally()
    assert entries(path, tally=tally) == []
    assert dict(tally.counts) == {"unknown_compression": 1, "encrypted": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_larger_than_images_may_be_is_not_read(path: Path, kind: str) -> None:
    pack(path, [("big.jpg", bytes(MAX_BYTES + 1)), ("fits.jpg", bytes(MAX_BYTES))], kind)
    big, fits = entries(path)
    assert isinstance(big.content, ImageError)
    assert big.content.code == "image_too_large"
    assert fits.content == bytes(MAX_BYTES)


def test_a_zip_that_understates_its_sizes_is_not_believed(path: Path) -> None:
    pack(path, [("bomb.jpg", bytes(50 * MAX_BYTES)), ("good.jpg", b"good")], "zip")
    data = path.read_bytes().replace(struct.pack("<L", 50 * MAX_BYTES), struct.pack("<L", 100))
    path.write_bytes(data)
    tracemalloc.start()
    bomb, good = entries(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(bomb.content, ImageError)
    assert good.content == b"good"
    assert peak < 8 * MAX_BYTES


def test_a_bomb_of_zeros_ends_the_reading(path: Path) -> None:
    member = tarfile.TarInfo("zeros.jpg")
    member.size = 300 << 20
    with gzip.open(path, "wb", compresslevel=9) as stream:
        stream.write(member.tobuf())
        for _ in range(300):
            stream.write(bytes(1 << 20))
    with pytest.raises(ArchiveInvalid, match="unpacks to more than"):
        entries(path)


def test_a_member_that_claims_more_than_there_is_ends_the_reading(path: Path) -> None:
    member = tarfile.TarInfo("claims.jpg")
    member.size = 8**11 - 1
    path.write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(ArchiveInvalid):
        entries(path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_absurd_size_is_not_read_into_memory(path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("header")
    header.type = kind
    header.size = 60 << 20
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(header.tobuf())
        for _ in range(60):
            stream.write(b"x" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(ArchiveInvalid, match="absurd size"):
        entries(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def test_thousands_of_chained_headers_are_an_error_not_a_crash(path: Path) -> None:
    header = tarfile.TarInfo("header")
    header.type = tarfile.XHDTYPE
    path.write_bytes(header.tobuf() * 5000 + bytes(1024))
    with pytest.raises(ArchiveInvalid):
        entries(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_an_archive_that_was_cut_is_refused(path: Path, kind: str, share: float) -> None:
    pack(path, [(f"{number}.jpg", jpeg(number, (320, 240))) for number in range(20)], kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share) // 512 * 512 + 100])
    with pytest.raises(ArchiveInvalid, match="upload it again"):
        entries(path)


def test_rubbish_between_members_is_not_taken_for_the_end(path: Path) -> None:
    pack(path, [(f"{number}.jpg", b"x" * 512) for number in range(10)], "tar")
    data = bytearray(path.read_bytes())
    data[5 * 1024 : 6 * 1024] = b"\xaa" * 1024
    path.write_bytes(data)
    with pytest.raises(ArchiveInvalid, match="damaged"):
        entries(path)


def test_a_damaged_member_of_a_zip_spoils_only_itself(path: Path) -> None:
    pack(path, [("a.jpg", jpeg(1, (640, 480))), ("b.jpg", b"good")], "zip")
    data = bytearray(path.read_bytes())
    data[200:220] = bytes(20)
    path.write_bytes(data)
    damaged, good = entries(path)
    assert isinstance(damaged.content, ImageError)
    assert good.content == b"good"


@pytest.mark.parametrize(
    "data",
    [b"", b"no archive", b"\x1f\x8b" + bytes(100), b"PK\x03\x04" + bytes(100), bytes(1024)],
)
def test_what_is_no_archive_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(ArchiveInvalid) as caught:
        entries(path)
    assert caught.value.param == "images"


def test_names_in_chinese_encodings_are_understood(path: Path) -> None:
    raw = "麻婆豆腐.jpg".encode("gb18030")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x" * len(raw), b"zip")
    path.write_bytes(path.read_bytes().replace(b"x" * len(raw), raw))
    assert entries(path) == [("麻婆豆腐.jpg", b"zip")]
    with tarfile.open(path, "w", encoding="gb18030", format=tarfile.GNU_FORMAT) as archive_:
        member = tarfile.TarInfo("麻婆豆腐.jpg")
        member.size = 3
        archive_.addfile(member, io.BytesIO(b"tar"))
    assert entries(path) == [("麻婆豆腐.jpg", b"tar")]


def test_composed_and_decomposed_letters_are_one_name() -> None:
    assert plain_name("cafe\u0301/1.jpg") == plain_name("./caf\u00e9//1.jpg") == "café/1.jpg"


def test_an_old_tar_without_a_signature_is_read(path: Path) -> None:
    pack(path, [("a.jpg", b"one")], "tar")
    data = bytearray(path.read_bytes())
    header = tarfile.TarInfo.frombuf(bytes(data[:512]), "utf-8", "strict")
    raw = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    raw[257:265] = bytes(8)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    data[:512] = raw
    path.write_bytes(data)
    assert entries(path) == [("a.jpg", b"one")]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_can_be_stopped(path: Path, kind: str) -> None:
    pack(path, [(f"{number}.jpg", b"x") for number in range(5)], kind)
    seen: list[str] = []

    def stop_at_the_third() -> None:
        seen.append("")
        if len(seen) == 3:
            raise LeaseLost

    with pytest.raises(LeaseLost):
        entries(path, keep_going=stop_at_the_third)
    assert len(seen) == 3


def test_memory_does_not_grow_with_the_number_of_members(path: Path) -> None:
    pack(path, [(f"{number:06}.jpg", b"x") for number in range(5000)], "tar")
    tracemalloc.start()
    entries(path, lambda name: False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
