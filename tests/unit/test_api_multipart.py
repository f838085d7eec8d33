"""Reading upload forms: the pieces a form arrives in say nothing about what is in it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from api.multipart import FormReader, safe_filename
from shared.errors import InvalidRequest

CONTENT_TYPE = "multipart/form-data; boundary=b0"


def _form(content: bytes, *, purpose: str = "batch", file_first: bool = False) -> bytes:
    field = b'--b0\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + purpose.encode()
    file = b'--b0\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + content
    parts = [file, field] if file_first else [field, file]
    return b"\r\n".join(parts) + b"\r\n--b0--\r\n"


def _pieces(whole: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    return [whole[start:end] for start, end in pairwise(edges)]


@settings(deadline=None)  # the machine may be busy
@given(
    content=st.one_of(
        st.binary(max_size=300),
        st.lists(st.sampled_from([b"\r", b"\n", b"--", b"b0", b"-", b"x"])).map(b"".join),
    ),
    cuts=st.lists(st.integers(min_value=0)),
    file_first=st.booleans(),
)
def test_any_content_in_any_pieces_is_read_whole(
    content: bytes, cuts: list[int], file_first: bool
) -> None:
    """Nearly-boundaries in the content and cuts in the middle of real ones change nothing."""
    assume(b"--b0" not in content)
    got = bytearray()
    reader = FormReader(got.extend)
    reader.read(CONTENT_TYPE, iter(_pieces(_form(content, file_first=file_first), cuts)))
    assert bytes(got) == content
    assert reader.fields == {"purpose": "batch"}
    assert reader.filename == "a"


@pytest.mark.parametrize("behind", range(8))
def test_a_cut_just_behind_a_boundary_adds_nothing_to_the_file(behind: int) -> None:
    """The decoder alone would keep the line break before the boundary as content."""
    whole = _form(b"content", file_first=True)
    cut = whole.index(b"content\r\n--b0") + len(b"content\r\n--b0") + behind - 4
    got = bytearray()
    FormReader(got.extend).read(CONTENT_TYPE, iter([whole[:cut], whole[cut:]]))
    assert bytes(got) == b"content"


@settings(deadline=None)  # the machine may be busy
@given(end=st.integers(min_value=0))
def test_a_form_cut_short_anywhere_is_an_error(end: int) -> None:
    """Nothing but the whole form, up to its closing boundary, is accepted."""
    whole = _form(b"content").removesuffix(b"--\r\n")
    with pytest.raises(InvalidRequest):
        FormReader(lambda _: None).read(CONTENT_TYPE, iter([whole[: end % len(whole)]]))


@settings(deadline=None)  # the machine may be busy
@given(name=st.text())
def test_a_safe_filename_is_safe_whatever_it_was(name: str) -> None:
    """Never empty, never a path, never longer than a file's name may be, nothing unprintable."""
    safe = safe_filename(name)
    assert safe
    assert safe not in {".", ".."}
    assert not set(safe) & set("/\\\r\n\0")
    assert len(safe.encode()) <= 255
    assert safe_filename(safe) == safe
