"""Where images may come from: data URLs, uploads, and paths under the roots and nowhere else."""

from __future__ import annotations

import base64
import io
import os
import threading
from pathlib import Path

import pytest
from PIL import Image

from shared.errors import (
    ImageError,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    ImageTruncated,
    ImageUnreadable,
)
from shared.settings import ImageSettings
from workers.inference.image_files import ImageRoots
from workers.inference.image_sources import ImageReader


def jpeg(width: int = 30, height: int = 20) -> bytes:
    """A small JPEG file."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "JPEG")
    return file.getvalue()


def no_uploads(file_id: str) -> Path:
    """For tests without uploads."""
    raise ImageNotFound(f"there is no file {file_id}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A configured root with an image in it, and a secret image beside the root."""
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "root" / "sub" / "b c#1.jpg").write_bytes(jpeg(11, 12))
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "a.jpg").write_bytes(jpeg())
    return tmp_path / "root"


@pytest.fixture
def reader(root: Path) -> ImageReader:
    """A reader with that one root."""
    return ImageReader(ImageSettings(roots=(root,), allow_http=False), no_uploads)


def data_url(data: bytes, media_type: str = "image/jpeg") -> str:
    """The data: URL of these bytes."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


# --- data URLs --------------------------------------------------------------------------------


@pytest.mark.parametrize("media_type", ["image/jpeg", "image/png", "text/plain;charset=utf-8", ""])
def test_a_data_url_gives_the_file_with_its_size(reader: ImageReader, media_type: str) -> None:
    """The bytes are passed on unchanged; the declared type is ignored."""
    image = reader.read(data_url(jpeg(), media_type), "low")
    assert (image.data, image.encoding, image.width, image.height, image.detail) == (
        jpeg(),
        "file",
        30,
        20,
        "low",
    )


@pytest.mark.parametrize(
    "url",
    [
        "data:image/jpeg,abc",
        "data:image/jpeg;base64",
        "data:",
        "data:image/jpeg;base64,",
        "data:image/jpeg;base64,@@@@",
        "data:image/jpeg;base64,/9j",
        "data:image/jpeg;base64,/9j/\n4AAQ",
        "data:image/jpeg;base64,_9j-",
        "data:image/jpeg;base64,%2F9j%2F",
        "data:image/jpeg;base64,/9j/é",
        "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(),
        "data:" + "x" * 10_000 + ";base64,/9j/",
    ],
)
def test_a_broken_data_url_is_unreadable(reader: ImageReader, url: str) -> None:
    """Only plain base64 is taken, and the message stays short."""
    with pytest.raises(ImageUnreadable) as caught:
        reader.read(url)
    assert len(caught.value.message) < 200


def test_a_data_url_too_long_is_refused_by_its_length(root: Path) -> None:
    """Before a byte of it is decoded: this one is not even base64."""
    reader = ImageReader(ImageSettings(max_bytes=1000), no_uploads)
    with pytest.raises(ImageTooLarge):
        reader.read("data:image/png;base64," + "!" * 2000)


def test_an_image_of_exactly_the_limit_passes(root: Path) -> None:
    """The estimate from the length refuses nothing that is allowed."""
    for padding in range(4):
        data = jpeg() + bytes(padding)
        reader = ImageReader(ImageSettings(max_bytes=len(data)), no_uploads)
        assert reader.read(data_url(data)).data == data


def test_messages_never_repeat_the_image(reader: ImageReader) -> None:
    """A megabyte of base64 belongs in no log and no error file."""
    with pytest.raises(ImageError) as caught:
        reader.read(data_url(jpeg()[:-50]))
    assert isinstance(caught.value, ImageTruncated)
    assert base64.b64encode(jpeg())[:20].decode() not in caught.value.message


# --- uploads ----------------------------------------------------------------------------------


def test_an_uploaded_file_is_read_through_the_callers_check(tmp_path: Path) -> None:
    """The caller decides whose file it is; its refusal comes through unchanged."""
    (tmp_path / "blob").write_bytes(jpeg())

    def open_upload(file_id: str) -> Path:
        if file_id == "file-mine1":
            return tmp_path / "blob"
        if file_id == "file-gone1":
            return tmp_path / "gone"
        raise ImageForbidden("not yours")

    reader = ImageReader(ImageSettings(), open_upload)
    assert reader.read("file-mine1").width == 30
    with pytest.raises(ImageForbidden, match="not yours"):
        reader.read("file-other1")
    with pytest.raises(ImageNotFound):
        reader.read("file-gone1")


@pytest.mark.parametrize("url", ["file-../../etc/passwd", "file-a/b", "file-", "file-a\0"])
def test_what_is_no_file_id_never_reaches_the_caller(url: str) -> None:
    """The callback may use the id in a path."""
    asked: list[str] = []

    def open_upload(file_id: str) -> Path:
        asked.append(file_id)
        raise ImageNotFound

    with pytest.raises(ImageForbidden):
        ImageReader(ImageSettings(), open_upload).read(url)
    assert asked == []


# --- paths ------------------------------------------------------------------------------------


def test_a_path_under_a_root_is_read(reader: ImageReader, root: Path) -> None:
    """As a path and as a file:// URL, percent-encoded or not."""
    assert reader.read(str(root / "a.jpg")).width == 30
    assert reader.read(f"file://{root}/a.jpg").width == 30
    assert reader.read(f"FILE://localhost{root}/sub/b%20c%231.jpg").width == 11
    assert reader.read(str(root / "sub" / "b c#1.jpg")).width == 11


def test_links_that_stay_inside_a_root_are_followed(reader: ImageReader, root: Path) -> None:
    """Image sets are often made of links."""
    (root / "link.jpg").symlink_to(root / "a.jpg")
    (root.parent / "alias").symlink_to(root)
    assert reader.read(str(root / "link.jpg")).width == 30
    assert reader.read(str(root.parent / "alias" / "a.jpg")).width == 30


def test_a_root_may_itself_be_a_link(root: Path) -> None:
    """Operators mount storage where they like."""
    (root.parent / "images").symlink_to(root)
    reader = ImageReader(ImageSettings(roots=(root.parent / "images",)), no_uploads)
    assert reader.read(str(root.parent / "images" / "a.jpg")).width == 30


OUTSIDE = {
    "elsewhere": "/etc/passwd",
    "elsewhere by URL": "file:///etc/passwd",
    "beside": "{parent}/secret.jpg",
    "same beginning": "{root}-2/a.jpg",
    "dots": "{root}/../secret.jpg",
    "dots in the middle": "{root}/sub/../../secret.jpg",
    "encoded dots": "file://{root}/%2e%2e/secret.jpg",
    "encoded slash": "file://{root}/..%2fsecret.jpg",
    "link": "{root}/out.jpg",
    "dangling link": "{root}/dangling.jpg",
    "linked folder": "{root}/up/secret.jpg",
    "relative link": "{root}/relative",
    "chain of links": "{root}/chain",
    "loop": "{root}/loop",
    "NUL": "{root}/a.jpg\0.png",
    "encoded NUL": "file://{root}/a.jpg%00.png",
    "relative": "root/a.jpg",
    "dot": "./a.jpg",
    "home": "~/a.jpg",
    "other host": "file://otherhost{root}/a.jpg",
    "one slash": "file:{root}/a.jpg",
    "no path": "file://",
    "half a character": "{root}/\ud800.jpg",
    "double slash": "//{parent}/secret.jpg",
    "through /proc": "/proc/self/root{parent}/secret.jpg",
    "the root itself": "{root}",
    "ftp": "ftp://example.com/a.jpg",
    "script": "javascript:alert(1)",
    "nothing": "",
}


@pytest.mark.parametrize("way", OUTSIDE)
def test_nothing_outside_the_roots_is_read(reader: ImageReader, root: Path, way: str) -> None:
    """Whatever the spelling, and whatever links lie in the root."""
    (root / "out.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "dangling.jpg").symlink_to(root.parent / "no-such.jpg")
    (root / "up").symlink_to(root.parent)
    (root / "relative").symlink_to("../secret.jpg")
    (root / "chain").symlink_to("out.jpg")
    (root / "loop").symlink_to("loop")
    with pytest.raises(ImageForbidden):
        reader.read(OUTSIDE[way].format(root=root, parent=root.parent))


def test_the_answer_does_not_tell_whether_a_file_outside_exists(
    reader: ImageReader, root: Path
) -> None:
    """Same error and same words for what is there and what is not, links included."""
    (root / "there.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "not_there.jpg").symlink_to(root.parent / "missing.jpg")

    def answer(path: Path) -> tuple[type[ImageError], str]:
        with pytest.raises(ImageError) as caught:
            reader.read(str(path))
        return type(caught.value), caught.value.message.replace(str(path), "PATH")

    assert answer(root.parent / "secret.jpg") == answer(root.parent / "missing.jpg")
    assert answer(root / "there.jpg") == answer(root / "not_there.jpg")


def test_a_missing_file_inside_a_root_is_not_found(reader: ImageReader, root: Path) -> None:
    """Inside the roots the answer may be plain."""
    for name in ("missing.jpg", "a.jpg/b.jpg", "x" * 300):
        with pytest.raises(ImageNotFound):
            reader.read(str(root / name))


def test_only_regular_files_are_read(reader: ImageReader, root: Path) -> None:
    """A pipe without a writer would otherwise block the worker for ever."""
    os.mkfifo(root / "pipe")
    for name in ("pipe", "sub"):
        with pytest.raises(ImageForbidden, match="regular"):
            reader.read(str(root / name))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_forbidden(reader: ImageReader, root: Path) -> None:
    """File permissions are the operator's word too."""
    (root / "a.jpg").chmod(0)
    with pytest.raises(ImageForbidden, match="may not read"):
        reader.read(str(root / "a.jpg"))


def test_a_device_under_a_root_is_refused() -> None:
    """Reading /dev/zero would never end."""
    with pytest.raises(ImageForbidden, match="regular"):
        ImageRoots((Path("/dev"),), 1000).read("/dev/zero")


def test_a_file_that_holds_more_than_it_says_is_read_to_its_end() -> None:
    """As one that grows meanwhile; those of /proc say that they hold nothing."""
    proc = Path("/proc/version")
    assert proc.stat().st_size == 0
    assert ImageRoots((Path("/proc"),), 10_000).read(str(proc)) == proc.read_bytes()
    with pytest.raises(ImageTooLarge):
        ImageRoots((Path("/proc"),), 20).read(str(proc))


def test_a_large_file_is_refused_by_its_size(root: Path) -> None:
    """A sparse terabyte costs nothing."""
    with (root / "huge.jpg").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageTooLarge):
        ImageReader(ImageSettings(roots=(root,)), no_uploads).read(str(root / "huge.jpg"))


def test_without_roots_the_message_says_how_to_configure_them() -> None:
    """The default reads nothing from the disk."""
    with pytest.raises(ImageForbidden, match=r"images\.roots"):
        ImageReader(ImageSettings(), no_uploads).read("/data/a.jpg")


def test_swapping_links_while_reading_never_leads_out(root: Path) -> None:
    """A folder that is replaced by a link between check and open is noticed on the descriptor."""
    (root / "swap").mkdir()
    (root / "swap" / "secret.jpg").write_bytes(b"inside")
    (root.parent / "secret.jpg").write_bytes(b"outside")
    roots = ImageRoots((root,), 1000)
    stop = threading.Event()

    def swap() -> None:
        folder, link, current = root / "folder", root / "link", root / "swap"
        link.symlink_to(root.parent)
        while not stop.is_set():
            current.rename(folder)
            link.rename(current)
            current.rename(link)
            folder.rename(current)

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen: set[bytes] = set()
    try:
        for _ in range(8000):
            try:
                seen.add(roots.read(str(root / "swap" / "secret.jpg")))
            except ImageError as error:
                seen.add(error.code.encode())
    finally:
        stop.set()
        swapper.join()
    assert b"outside" not in seen
    assert b"inside" in seen
