"""Checkpoint folders seen from their files: what is whole, what is not, and which file is named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from shared import checkpoints
from shared.checkpoints import check_checkpoint, read_header, require_whole, weights_bytes
from shared.errors import CheckpointInvalid, EngineSetupFailed
from tests.checkpoints import TENSORS, safetensors, with_header, write_checkpoint, write_sharded
from workers.inference.tiny import CHECKPOINT

WHOLE = safetensors()
HEADER_END = 8 + int.from_bytes(WHOLE[:8], "little")


def tensor(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(**tensors: object) -> bytes:
    """A file of four bytes of weights under this header."""
    return with_header(json.dumps(tensors).encode(), b"1234")


def test_the_bundled_checkpoint_is_whole() -> None:
    """And its weights are as large as its tensors."""
    check_checkpoint(CHECKPOINT)
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as opened:
        tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
    assert weights_bytes(CHECKPOINT) == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("write", [write_checkpoint, write_sharded])
def test_a_whole_folder_passes(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """In one file or several; the bytes of the weights are the same."""
    folder = write(tmp_path)
    check_checkpoint(folder)
    assert weights_bytes(folder) == sum(size for _, _, size in TENSORS.values())


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.json", None, r"holds no config\.json"),
        ("config.json", b"{", r"config\.json .*not JSON"),
        ("config.json", b"\xff{}", r"config\.json .*not JSON"),
        ("config.json", b"[" * 100_000, r"config\.json .*not JSON"),
        ("config.json", b"[]", r"config\.json .*not a JSON object"),
        ("config.json", b"{}", "neither a model_type nor architectures"),
        ("config.json", b'{"model_type": 5, "architectures": []}', "neither a model_type"),
        ("tokenizer.json", None, "holds no tokenizer"),
        ("model.safetensors", None, r"has no model\.safetensors"),
        ("model.safetensors", b"", r"model\.safetensors is empty"),
    ],
)
def test_a_missing_or_broken_file_is_named(
    tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    """With what is wrong with it."""
    folder = write_checkpoint(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointInvalid, match=told):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "told"),
    [
        ({"a": "gone.safetensors"}, r"has no gone\.safetensors"),
        ({"a": "../elsewhere.safetensors"}, "outside the folder"),
        ({"a": "/etc/passwd"}, "outside the folder"),
        ({"a": ".."}, "outside the folder"),
        ({"a": 5}, "outside the folder"),
        ({"a": "x" * 300}, "or no file"),
        ({"a": "a\0b\ud800"}, "or no file"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({"zzz": "model-00001-of-00002.safetensors"}, "lacks the tensor 'zzz'"),
    ],
)
def test_an_index_must_agree_with_the_shards(tmp_path: Path, weight_map: object, told: str) -> None:
    """Each file it names is there, in the folder, and holds what it says."""
    folder = write_sharded(tmp_path)
    (folder / checkpoints.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointInvalid, match=told):
        check_checkpoint(folder)


def test_shards_without_their_index_are_told(tmp_path: Path) -> None:
    """The index is what was forgotten."""
    folder = write_sharded(tmp_path)
    (folder / checkpoints.INDEX).unlink()
    with pytest.raises(CheckpointInvalid, match=r"but no model\.safetensors\.index\.json"):
        check_checkpoint(folder)


def test_pickles_are_refused_unless_the_folders_code_may_run(tmp_path: Path) -> None:
    """With the reason; next to safetensors they are not even looked at."""
    folder = write_checkpoint(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"")
    check_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointInvalid, match=r"pickle.*can run code"):
        check_checkpoint(folder)
    with pytest.raises(CheckpointInvalid, match="is empty"):
        check_checkpoint(folder, pickles=True)
    (folder / "pytorch_model.bin").write_bytes(b"1234567")
    check_checkpoint(folder, pickles=True)
    assert weights_bytes(folder) == 7


def test_an_engine_fails_its_setup(tmp_path: Path) -> None:
    """The file and the reason are in the message."""
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").write_bytes(WHOLE[:-1])
    with pytest.raises(EngineSetupFailed, match=r"model\.safetensors .*cut short"):
        require_whole(folder, pickles=False)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (WHOLE[:7], "only 7 bytes"),
        (struct.pack("<Q", 100_000_001) + b"{}", "header would have 100000001 bytes"),
        (struct.pack("<Q", 2**64 - 1), "header would have"),
        (struct.pack("<Q", 1000) + b"{}", "longer than the file"),
        (with_header(b""), "not JSON"),
        (with_header(b" {}"), "not JSON"),
        (with_header(b"{"), "not JSON"),
        (with_header(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
        (with_header(b'{"a":{"b":' * 50_000), "not JSON"),
        (with_header(b'{"a": 1, "a": 2}'), "names 'a' twice"),
        (header(__metadata__={"format": 5}), "metadata"),
        (header(__metadata__=[]), "metadata"),
        (header(a=[]), "does not describe"),
        (header(a={"dtype": "F32"}), "does not describe"),
        (with_header(b'{"\\ud800": {}}'), "does not describe"),
        (header(a=tensor("F31")), "unknown type 'F31'"),
        (header(a=tensor(shape=[-1])), "proper shape"),
        (header(a=tensor(shape=[True])), "proper shape"),
        (header(a=tensor(shape=[1.0])), "proper shape"),
        (header(a=tensor(offsets=[0])), "proper shape"),
        (header(a=tensor(offsets=[0, 2**64])), "proper shape"),
        (header(a=tensor(shape=[2])), "does not fill its place"),
        (header(a=tensor(offsets=[4, 0])), "does not fill its place"),
        (header(a=tensor("F4", [3], [0, 2])), "does not fill its place"),
        (header(a=tensor(), b=tensor()), "overlaps another"),
        (header(a=tensor(), b=tensor(offsets=[5, 9])), "follows a gap"),
        (header(a=tensor("U8", [1], [3, 4])), "follows a gap"),
        (header(a=tensor("U8", [8], [0, 8])), "cut short: 4 bytes of weights instead of 8"),
        (header(a=tensor("U8", [3], [0, 3])), "too long"),
        (header(), "too long"),
    ],
)
def test_a_file_that_its_header_does_not_fit_is_refused(
    tmp_path: Path, content: bytes, told: str
) -> None:
    """By name, with the reason."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointInvalid, match=told) as refused:
        read_header(path)
    assert str(path) in refused.value.message
    assert refused.value.message.isascii()


def accepted(path: Path) -> bool:
    """Whether the file passes; what passes must pass with the format's own library, too."""
    try:
        tensors = read_header(path)
    except CheckpointInvalid:
        return False
    assert sum(place.end - place.start for place in tensors.values()) == len(WHOLE) - HEADER_END
    with safe_open(path, framework="np") as opened:
        assert set(opened.keys()) == set(tensors)
    return True


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to write over."""
    return tmp_path_factory.mktemp("flips") / "model.safetensors"


@given(length=st.integers(0, len(WHOLE) - 1))
def test_any_truncation_is_refused(scratch: Path, length: int) -> None:
    """Wherever the file ends."""
    scratch.write_bytes(WHOLE[:length])
    assert not accepted(scratch)


@given(place=st.integers(0, HEADER_END - 1), value=st.integers(0, 255))
def test_any_byte_of_the_header_may_be_wrong(scratch: Path, place: int, value: int) -> None:
    """It is refused, or as consistent as before; nothing else is raised."""
    scratch.write_bytes(WHOLE[:place] + bytes([value]) + WHOLE[place + 1 :])
    accepted(scratch)


@given(st.binary(max_size=300))
def test_no_bytes_whatever_raise_anything_else(scratch: Path, content: bytes) -> None:
    """Neither as a file nor as a header."""
    for written in (content, with_header(b"{" + content), with_header(content, content)):
        scratch.write_bytes(written)
        try:
            read_header(scratch)
        except CheckpointInvalid:
            continue
