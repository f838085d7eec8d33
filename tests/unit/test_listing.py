"""Listing image sets: every kind of place, its order, and going on from anywhere."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
import tarfile
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from shared.captions import CaptionSource, Entry, ImagePlace
from shared.errors import ImageError, ImageSetUnreadable, TextMissing
from shared.settings import ImageSettings
from tests.image_sets import jpeg, listed, source, surroundings, tar, write, zipped
from workers.inference import sorted_names
from workers.inference.entry_images import EntryImages, path_of
from workers.inference.listing_base import Found

Entries = Callable[..., list[Found]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder that images may be read from."""
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def find(root: Path, tmp_path: Path) -> Entries:
    """Lists a set, and once more from behind every entry, which must give the rest."""

    def find(asked: CaptionSource, **options: object) -> list[Found]:
        def around() -> object:
            return surroundings(
                root, tmp_path / "scratch", columns=asked.columns, uploads=tmp_path / "uploads"
            )

        everything = list(listed(asked, around()))
        for index, found in enumerate(everything):
            cursor = msgspec.json.decode(msgspec.json.encode(found.cursor))
            rest = [(item.entry, item.place) for item in listed(asked, around(), cursor)]
            assert rest == [(item.entry, item.place) for item in everything[index + 1 :]], cursor
        return everything

    return find


def names(found: list[Found]) -> list[str]:
    """The names of the entries."""
    return [item.entry.name for item in found]


def refusals(found: list[Found]) -> dict[str, str]:
    """The codes of the entries that cannot be used."""
    return {item.entry.name: item.entry.refused[0] for item in found if item.entry.refused}


def reader(root: Path, uploads: Path | None = None) -> EntryImages:
    """Reads what was listed."""
    settings = ImageSettings(roots=(root,))
    return EntryImages(settings, lambda file_id: (uploads or root) / file_id, lambda url: b"")


# --- folders ----------------------------------------------------------------------------------


def test_a_folder_is_listed_by_name_and_from_anywhere(root: Path, find: Entries) -> None:
    """A random tree: the order is that of sorting every path by its parts."""
    chance = random.Random(5)
    paths = set()
    for number in range(150):
        parts = [
            chance.choice("ab.-éZ") * chance.randint(1, 3) for _ in range(chance.randint(0, 3))
        ]
        folder = "/".join(part.replace(".", "_") for part in parts)
        paths.add(f"{folder}/{number % 70}{chance.choice(['.jpg', '.JPEG', '.png'])}".lstrip("/"))
    for path in paths:
        write(root / "set" / path)
    found = find(source(root / "set"))
    assert names(found) == sorted(paths, key=lambda path: path.split("/"))
    for item in found:
        status = Path(path_of(item.entry, item.place)).stat()
        assert (item.entry.size, item.entry.mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_a_folder_of_more_names_than_fit_in_memory_is_sorted_on_disk(
    root: Path, find: Entries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In runs, which are merged; nothing is left of them."""
    monkeypatch.setattr(sorted_names, "RUN_NAMES", 7)
    made = {f"{number}-\n-{number % 3}.jpg" for number in range(60)}
    for name in made:
        write(root / "set" / name)
    assert names(find(source(root / "set"))) == sorted(made)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_any_name_is_listed_under_a_text_of_its_own(root: Path, find: Entries) -> None:
    """Line feeds, emoji, 255 bytes, no UTF-8, and what reads like an escape; all can be read again."""
    raw = [
        b"a\nb.jpg",
        "🦊.jpg".encode(),
        b"x" * 251 + b".jpg",
        b"\xff\xfe.jpg",
        rb"\xff\xfe.jpg",
        rb"\x5c.jpg",
        b'"quoted".jpg',
        b"bad\xe9/\xff.jpg",
    ]
    for number, name in enumerate(raw):
        write(root / "set" / os.fsdecode(name), jpeg(number))
    found = find(source(root / "set"))
    assert len(set(names(found))) == len(raw)
    images = reader(root)
    contents = {images.load(item.entry, item.place) for item in found}
    assert contents == {jpeg(number) for number in range(len(raw))}
    assert b"\\xff\\xfe.jpg" in {name.encode() for name in names(found)}


def test_links_lead_neither_around_nor_out(root: Path, find: Entries, tmp_path: Path) -> None:
    """A loop ends; a link to a folder elsewhere is told; links to files are listed."""
    write(root / "set" / "a" / "1.jpg", jpeg())
    write(root / "other" / "2.jpg")
    secret = write(tmp_path / "secret.jpg", jpeg())
    (root / "set" / "a" / "loop").symlink_to(root / "set")
    (root / "set" / "self").symlink_to("self")
    (root / "set" / "elsewhere").symlink_to(root / "other")
    (root / "set" / "link.jpg").symlink_to(root / "set" / "a" / "1.jpg")
    (root / "set" / "out.jpg").symlink_to(secret)
    (root / "set" / "gone.jpg").symlink_to("nothing")
    found = find(source(root / "set"))
    assert names(found) == ["a/1.jpg", "elsewhere/", "gone.jpg", "link.jpg", "out.jpg"]
    assert refusals(found) == {"elsewhere/": "entry_refused"}
    images = reader(root)
    assert images.load(found[3].entry, found[3].place) == jpeg()
    for index, code in ((2, "image_not_found"), (4, "image_forbidden")):
        with pytest.raises(Exception, match=r".") as refused:
            images.load(found[index].entry, found[index].place)
        assert refused.value.code == code


def test_a_folder_that_is_moved_away_is_not_read(root: Path, find: Entries, tmp_path: Path) -> None:
    """Not even while it is held open; one in its place is."""
    for number in range(3):
        write(root / "set" / f"{number}.jpg", jpeg(number))
    first, second, third = find(source(root / "set"))
    images = reader(root)
    assert images.load(first.entry, first.place) == jpeg(0)
    (root / "set").rename(tmp_path / "moved")
    for item in (second, third):
        with pytest.raises(ImageError) as refused:
            images.load(item.entry, item.place)
        assert refused.value.code == "image_forbidden"
    (root / "set").mkdir()
    (tmp_path / "moved" / "2.jpg").rename(root / "set" / "2.jpg")
    assert images.load(third.entry, third.place) == jpeg(2)
    images.close()


def test_a_file_that_becomes_a_link_is_not_followed(
    root: Path, find: Entries, tmp_path: Path
) -> None:
    """Wherever it leads."""
    path = write(root / "set" / "1.jpg", jpeg())
    [found] = find(source(root / "set"))
    secret = write(tmp_path / "secret.jpg", jpeg())
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(ImageError) as refused:
        reader(root).load(found.entry, found.place)
    assert refused.value.code == "image_forbidden"


def test_a_folder_that_vanishes_while_it_is_listed_is_told(root: Path, find: Entries) -> None:
    """The others are listed."""
    for name in ("a/1.jpg", "b/2.jpg", "c/3.jpg"):
        write(root / "set" / name)
    listing = listed(source(root / "set"), surroundings(root, root / "scratch"))
    assert next(listing).entry.name == "a/1.jpg"
    (root / "set" / "b" / "2.jpg").unlink()
    (root / "set" / "b").rmdir()
    rest = list(listing)
    assert names(rest) == ["b/", "c/3.jpg"]
    assert refusals(rest) == {"b/": "image_not_found"}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("set/*.jpg", ["1.jpg", "2.jpg"]),
        ("set/**/*.jpg", ["1.jpg", "2.jpg", "a/3.jpg", "a/b/4.jpg"]),
        ("set/[!1].*", ["2.jpg", "2.png"]),
        ("set/a*", ["a/3.jpg", "a/b/4.jpg", "ab/5.png"]),
        ("set/*/b", ["a/b/4.jpg"]),
        ("*/?.png", ["set/2.png"]),
        ("set/.h*/*", [".hidden/6.jpg"]),
    ],
)
def test_a_pattern_names_files_and_whole_folders(
    root: Path, find: Entries, pattern: str, expected: list[str]
) -> None:
    """Their names begin behind the part without wild cards."""
    for name in ("1.jpg", "2.jpg", "2.png", "a/3.jpg", "a/b/4.jpg", "ab/5.png", ".hidden/6.jpg"):
        write(root / "set" / name)
    assert names(find(source(root / pattern))) == expected


def test_several_places_have_labels(root: Path, find: Entries) -> None:
    """Each name begins with its place's; places of one name get numbers; one that is gone is told."""
    write(root / "x" / "set" / "1.jpg")
    write(root / "y" / "set" / "1.jpg")
    write(root / "2.jpg")
    found = find(source(root / "x" / "set", root / "y" / "set", root / "no", root / "2.jpg"))
    assert names(found) == ["set/1.jpg", "set-2/1.jpg", "no", "2.jpg"]
    assert refusals(found) == {"no": "image_set_unreadable"}


def test_nothing_outside_the_roots_is_listed(root: Path, find: Entries, tmp_path: Path) -> None:
    """Not by name, not by link, not by pattern."""
    write(tmp_path / "secret" / "1.jpg")
    (root / "way").symlink_to(tmp_path / "secret")
    for place in (tmp_path / "secret", root / "way", tmp_path / "s*", root / "way" / "*.jpg"):
        with pytest.raises(ImageSetUnreadable, match=r"images\.roots"):
            find(source(place))


# --- tar --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_by_offset(root: Path, find: Entries, kind: int) -> None:
    """In its own order, with long names; a member's bytes are where the entry says."""
    long = "/".join(["folder" * 5] * 4) + "/ü.jpg"
    files = [("b.jpg", jpeg(1)), ("a/c.png", jpeg(2)), ("notes.txt", b"x"), (long, jpeg(3))]
    found = find(source(tar(root / "set.tar", files, format=kind)))
    assert names(found) == ["b.jpg", "a/c.png", long]
    images = reader(root)
    assert [images.load(item.entry, item.place) for item in found] == [
        jpeg(1),
        jpeg(2),
        jpeg(3),
    ]
    images.close()


def test_a_webdataset_has_its_texts_beside_the_images(root: Path, find: Entries) -> None:
    """Of one key: text, fields of JSON, and images of several kinds."""
    shard = tar(
        root / "shard.tar",
        [
            ("s/0001.left.jpg", jpeg(1)),
            ("s/0001.txt", b"one\n"),
            ("s/0001.json", b'{"title": {"en": "One"}, "n": 1}'),
            ("s/0001.right.jpg", jpeg(2)),
            ("s/0002.jpg", jpeg(3)),
            ("s/0002.txt", b"two"),
            ("s/0003.txt", b"nobody's"),
        ],
    )
    asked = source(shard, template="{txt} {json.title.en} {json.n}")
    found = find(asked)
    assert names(found) == ["s/0001.left.jpg", "s/0001.right.jpg", "s/0002.jpg"]
    images = reader(root)
    texts = [images.texts(item.entry, item.place, asked.columns) for item in found]
    whole = {"txt": "one", "json.title.en": "One", "json.n": "1"}
    assert texts == [whole, whole, {"txt": "two"}]
    images.close()


def test_a_hostile_tar_is_refused_entry_by_entry(root: Path, find: Entries) -> None:
    """What is harmless in it is listed; its names are told as they are."""
    path = root / "set.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("../../up.jpg", tarfile.REGTYPE),
            ("/etc/abs.jpg", tarfile.REGTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
            ("inner.tar", tarfile.REGTYPE),
            ("inner.ZIP", tarfile.REGTYPE),
            ("good.jpg", tarfile.REGTYPE),
            ("huge.jpg", tarfile.REGTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type = kind
            member.linkname = "/etc/passwd"
            data = bytes(2 << 20) if name == "huge.jpg" else b"x"
            member.size = len(data) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(data))
    found = find(source(path))
    assert [name for name in names(found) if name not in refusals(found)] == ["good.jpg"]
    assert refusals(found) == {
        "../../up.jpg": "entry_refused",
        "/etc/abs.jpg": "entry_refused",
        "link.jpg": "entry_refused",
        "hard.jpg": "entry_refused",
        "pipe.jpg": "entry_refused",
        "inner.tar": "entry_refused",
        "inner.ZIP": "entry_refused",
        "huge.jpg": "image_too_large",
    }


@pytest.mark.parametrize("damage", ["cut", "header", "size"])
def test_a_damaged_tar_is_listed_as_far_as_it_goes(root: Path, find: Entries, damage: str) -> None:
    """And says where it ends."""
    path = tar(root / "set.tar", [(f"{number}.jpg", jpeg(number)) for number in range(4)])
    data = bytearray(path.read_bytes())
    third = 2 * (512 + -(-len(jpeg(0)) // 512) * 512)
    if damage == "cut":
        del data[third + 600 :]
    elif damage == "header":
        data[third + 20] ^= 0xFF
    else:
        data[third + 124 : third + 135] = b"77777777777"
        data[third + 148 : third + 156] = b" " * 8
        data[third + 148 : third + 156] = b"%06o\0 " % sum(data[third : third + 512])
    path.write_bytes(data)
    found = find(source(path))
    assert names(found) == ["0.jpg", "1.jpg", f"set.tar (from byte {third})"]
    assert list(refusals(found).values()) == ["image_set_unreadable"]


def test_a_compressed_tar_is_refused_by_name(root: Path, find: Entries) -> None:
    """It cannot be read by offset."""
    path = root / "set.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(write(root / "1.jpg", jpeg()))
    with pytest.raises(ImageSetUnreadable, match=r"unpack it to a plain \.tar"):
        find(source(path))


# --- zip --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_a_zip_is_read_by_offset(root: Path, find: Entries, packed: bool) -> None:
    """With texts wherever they lie in it, and names from other countries."""
    files = [
        ("0.txt", b"zero"),
        ("b/1.jpg", jpeg(1)),
        ("a/图.jpg", jpeg(2)),
        ("c/", b""),
        ("b/1.txt", b"one"),
    ]
    path = zipped(root / "set.zip", files, packed=packed)
    asked = source(path, template="{txt}!")
    found = find(asked)
    assert names(found) == ["b/1.jpg", "a/图.jpg"]
    images = reader(root)
    assert [images.load(item.entry, item.place) for item in found] == [jpeg(1), jpeg(2)]
    texts = [images.texts(item.entry, item.place, asked.columns) for item in found]
    assert texts == [{"txt": "one"}, {}]
    images.close()


def test_a_zip_behind_something_else_is_read(root: Path, find: Entries) -> None:
    """As one that unpacks itself."""
    path = zipped(root / "set.zip", [("1.jpg", jpeg(1))])
    path.write_bytes(b"PK\x03\x04" + b"#!" * 500 + path.read_bytes())
    [found] = find(source(ImagePlace(path=str(path), type="zip")))
    assert reader(root).load(found.entry, found.place) == jpeg(1)


def test_a_hostile_zip_is_refused_entry_by_entry(root: Path, find: Entries) -> None:
    """Links, names that lead out, passwords, strange methods, bombs."""
    path = root / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../up.jpg", b"x")
        archive.writestr("/abs.jpg", b"x")
        archive.writestr("inner.zip", b"x")
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("bomb.jpg", bytes(64 << 20))
        archive.writestr("lzma.jpg", b"x", zipfile.ZIP_LZMA)
        archive.writestr("good.jpg", jpeg(1))
    found = find(source(path))
    assert refusals(found) == {
        "../up.jpg": "entry_refused",
        "/abs.jpg": "entry_refused",
        "inner.zip": "entry_refused",
        "link.jpg": "entry_refused",
        "bomb.jpg": "image_too_large",
        "lzma.jpg": "entry_refused",
    }
    assert reader(root).load(found[-1].entry, found[-1].place) == jpeg(1)


def test_a_zip_that_lies_about_sizes_cannot_grow(root: Path, find: Entries) -> None:
    """A member that unpacks to more than it says is an error of that entry."""
    path = zipped(root / "set.zip", [("1.jpg", bytes(500_000))])
    data = path.read_bytes()
    path.write_bytes(data.replace((500_000).to_bytes(4, "little"), (90).to_bytes(4, "little")))
    [found] = find(source(path))
    with pytest.raises(Exception, match="unpacks to more"):
        reader(root).load(found.entry, found.place)


@pytest.mark.parametrize("cut", [1, 30, 100, 2000])
def test_a_zip_cut_short_is_refused(root: Path, find: Entries, cut: int) -> None:
    """Its directory is at its end."""
    path = zipped(root / "set.zip", [(f"{number}.jpg", jpeg(number)) for number in range(30)])
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ImageSetUnreadable, match="damaged"):
        find(source(path))


def test_a_large_zip_has_its_numbers_elsewhere(
    root: Path, find: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As archives beyond 4 GiB or 65,535 members have them."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 300)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    path = zipped(root / "set.zip", [(f"{number}.jpg", jpeg(number)) for number in range(5)])
    assert b"PK\x06\x06" in path.read_bytes()
    found = find(source(path))
    images = reader(root)
    contents = [images.load(item.entry, item.place) for item in found]
    assert contents == [jpeg(number) for number in range(5)]
    images.close()


@pytest.mark.parametrize("make", [tar, zipped])
def test_whatever_the_bytes_of_an_archive_nothing_else_happens(
    root: Path, tmp_path: Path, make: Callable[..., Path]
) -> None:
    """Listed or refused; read or an image error; never an end that does not come."""
    chance = random.Random(11)
    members = [("a/1.jpg", jpeg(1)), ("a/1.txt", b"one"), ("b/" + "x" * 150 + ".jpg", jpeg(2))]
    good = make(root / "good", members).read_bytes()
    kind: Literal["tar", "zip"] = "tar" if make is tar else "zip"
    asked = source(ImagePlace(path=str(root / "bad"), type=kind), template="{txt}")
    for _ in range(400):
        data = bytearray(good)
        for _ in range(chance.choice([1, 1, 2, 8])):
            data[chance.randrange(len(data))] = chance.choice([0, 0xFF, chance.randrange(256)])
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        (root / "bad").write_bytes(data)
        images = reader(root)
        try:
            around = surroundings(root, tmp_path / "scratch", columns=("txt",))
            for item in islice(listed(asked, around), 100):
                if item.entry.refused is None:
                    with contextlib.suppress(ImageError, TextMissing):
                        images.texts(item.entry, item.place, asked.columns)
                    with contextlib.suppress(ImageError):
                        images.load(item.entry, item.place)
        except ImageSetUnreadable:
            pass
        finally:
            images.close()


# --- lists and tables -------------------------------------------------------------------------


def test_a_list_names_paths_by_line(root: Path, find: Entries) -> None:
    """Absolute or beside the list; blank lines are none; nothing leads out; URLs are taken."""
    for name in ("1.jpg", "b/2.jpg"):
        write(root / "set" / name, jpeg())
    lines = ["1.jpg", "", f"{root}/set/b/2.jpg", "../../x.jpg", "http://host/3.jpg", "1.jpg"]
    path = write(root / "set" / "list.txt", "\r\n".join(lines))
    found = find(source(path))
    assert names(found) == [line for line in lines if line]
    images = reader(root)
    assert images.load(found[0].entry, found[0].place) == jpeg()
    assert images.load(found[1].entry, found[1].place) == jpeg()
    assert images.load(found[3].entry, found[3].place) == b""
    with pytest.raises(Exception, match="without"):
        images.load(found[2].entry, found[2].place)


def test_a_list_of_objects_has_columns(root: Path, find: Entries) -> None:
    """Their texts go into the template; a line that is none is told."""
    rows = [{"file_name": "1.jpg", "tags": ["a", "é"], "id": 7}, {"file_name": "2.jpg"}, {"x": 1}]
    text = "".join(msgspec.json.encode(row).decode() + "\n" for row in rows) + "{bad\n"
    path = write(root / "set" / "metadata.jsonl", text)
    asked = source(ImagePlace(path=str(path), name_column="id"), template="{tags}")
    found = find(asked)
    assert names(found) == ["7", "2.jpg", "line 3", "line 4"]
    assert set(refusals(found)) == {"line 3", "line 4"}
    assert found[0].entry.texts == {"tags": '["a", "é"]'}
    assert found[1].entry.texts is None


def table(count: int) -> pa.Table:
    """Images as the Hugging Face hub has them, with a text for all but the first."""
    images = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in range(count)]
    return pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "caption": [None, *(f"text {number}" for number in range(1, count))],
        }
    )


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_a_table_of_images_is_read_by_row(root: Path, find: Entries, kind: str) -> None:
    """Rows in groups, in any order; columns are texts."""
    path = root / f"train.{kind}"
    made = table(25)
    if kind == "parquet":
        pyarrow.parquet.write_table(made, path, row_group_size=7)
    else:
        opener = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with opener(path, made.schema) as writer:
            writer.write_table(made, max_chunksize=7)
    asked = source(path, template="{caption}")
    found = find(asked)
    assert names(found) == [f"{number:08d}" for number in range(25)]
    images = reader(root)
    for index in (3, 4, 20, 24, 0, 9):
        assert images.load(found[index].entry, found[index].place) == jpeg(index)
    assert images.texts(found[9].entry, found[9].place, asked.columns) == {"caption": "text 9"}
    assert images.texts(found[0].entry, found[0].place, asked.columns) == {}
    images.close()


def test_a_table_of_paths_is_read_from_the_disk(root: Path, find: Entries) -> None:
    """By another column, under names of a third."""
    write(root / "1.jpg", jpeg(1))
    made = pa.table({"file": ["1.jpg", None], "id": ["x", "y"]})
    pyarrow.parquet.write_table(made, root / "t.parquet")
    place = ImagePlace(path=str(root / "t.parquet"), image_column="file", name_column="id")
    found = find(source(place))
    assert names(found) == ["x", "y"]
    assert refusals(found) == {"y": "image_unreadable"}
    assert reader(root).load(found[0].entry, found[0].place) == jpeg(1)


def test_without_the_library_tables_say_what_to_install(
    root: Path, find: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other kinds need none."""
    pyarrow.parquet.write_table(pa.table({"image": ["1.jpg"]}), root / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImageSetUnreadable, match=r"vlmq\[parquet\]"):
        find(source(root / "t.parquet"))


def test_a_type_that_is_not_there_is_refused(root: Path, find: Entries) -> None:
    """A pattern without wild cards is what it names."""
    write(root / "set" / "1.jpg", jpeg())
    for path, kind in ((root / "set", "tar"), (root / "set" / "1.jpg", "folder")):
        with pytest.raises(ImageSetUnreadable, match="folder"):
            find(source(ImagePlace(path=str(path), type=kind)))
    found = find(source(ImagePlace(path=str(root / "set"), type="glob")))
    assert names(found) == ["1.jpg"]


def test_a_table_without_the_column_names_those_it_has(root: Path, find: Entries) -> None:
    """So that the next try works."""
    pyarrow.parquet.write_table(pa.table({"picture": ["1.jpg"]}), root / "t.parquet")
    with pytest.raises(ImageSetUnreadable, match=r"image_column.*picture"):
        find(source(root / "t.parquet"))


def test_a_pattern_opens_archives_and_tables(root: Path, find: Entries) -> None:
    """Names begin with the file's; one that is broken is told, the others are listed."""
    tar(root / "set" / "b.tar", [("1.jpg", jpeg(1)), ("2.jpg", jpeg(2))])
    zipped(root / "set" / "c.zip", [("3.jpg", jpeg(3))])
    write(root / "set" / "a.tar", b"no tar \0")
    write(root / "set" / "d.jpg", jpeg(4))
    found = find(source(root / "set" / "*"))
    assert names(found) == ["a.tar", "b.tar/1.jpg", "b.tar/2.jpg", "c.zip/3.jpg", "d.jpg"]
    assert refusals(found) == {"a.tar": "image_set_unreadable"}
    images = reader(root)
    contents = [images.load(item.entry, item.place) for item in found[1:]]
    assert contents == [jpeg(number) for number in (1, 2, 3, 4)]
    images.close()


@pytest.mark.parametrize("make", [tar, zipped])
def test_an_upload_is_listed_like_a_file(
    root: Path, find: Entries, tmp_path: Path, make: Callable[..., Path]
) -> None:
    """By what is in it."""
    make(tmp_path / "uploads" / "file-1", [("1.jpg", jpeg(1))])
    [found] = find(source(ImagePlace(file="file-1")))
    assert found.entry.name == "1.jpg"
    assert reader(root, tmp_path / "uploads").load(found.entry, found.place) == jpeg(1)


def test_what_is_no_set_is_refused(root: Path, find: Entries) -> None:
    """Whatever else."""
    write(root / "x.bin", b"\0\1\2")
    with pytest.raises(ImageSetUnreadable, match="no folder, image, tar"):
        find(source(root / "x.bin"))


def test_an_archive_that_changed_is_an_error_of_its_entries(root: Path, find: Entries) -> None:
    """Its offsets mean nothing any more."""
    path = tar(root / "set.tar", [("1.jpg", jpeg(1)), ("2.jpg", jpeg(2))])
    found = find(source(path))
    images = reader(root)
    assert images.load(found[0].entry, found[0].place) == jpeg(1)
    with open(path, "ab") as stream:
        stream.write(b"more")
    for _ in range(2):
        with pytest.raises(Exception, match="not the file that it was") as changed:
            images.load(found[1].entry, found[1].place)
        assert changed.value.code == "image_changed"
    images.close()


def test_a_file_that_changed_is_an_error_of_its_entry(root: Path, find: Entries) -> None:
    """It is not what was listed."""
    path = write(root / "set" / "1.jpg", jpeg(1))
    [found] = find(source(root / "set"))
    path.write_bytes(jpeg(2) + b"x")
    with pytest.raises(Exception, match="not the file that it was"):
        reader(root).load(found.entry, found.place)
    fresh = msgspec.structs.replace(found.entry, size=None, mtime_ns=None)
    assert isinstance(fresh, Entry)
    assert reader(root).load(fresh, found.place) == jpeg(2) + b"x"
