"""What a consumer and an engine process say to each other over a Unix socket.

A frame is a 4-byte big-endian length and one msgpack message; a message holds many items, because
the cost is per frame. Ids of prompts are the client's own and mean something on one connection
only. An aborted prompt is not answered; every other prompt gets exactly one item of ``Done`` or
``Failed``.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

import msgspec

from shared.errors import ConfigurationError, EngineError
from workers.inference.engines.base import Completion, Prompt, Tiling

VERSION = 3
MAX_FRAME_BYTES = 256 * 1024 * 1024
TARGET_FRAME_BYTES = 8 * 1024 * 1024
"""Prompts with images are cut into frames of about this size, so that no frame blocks for long."""

_ROOM_BYTES = 256 * 1024
"""At least so many bytes can come at a time."""
_KEPT_BYTES = 16 * 1024 * 1024
"""A larger buffer is given back when no frame needs it."""
_MAX_SOCKET_PATH = 107
_LENGTH = struct.Struct(">I")

Mode = Literal["stream", "whole"]
Lane = Literal["chat", "batch"]


class MalformedFrame(EngineError):
    """The peer sent something that is not a message of this protocol."""


class FrameTooLarge(EngineError):
    """The message is larger than a frame may be."""


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """Prompts to answer; ``stream`` asks for deltas, ``whole`` for completions."""

    prompts: list[Prompt]
    mode: Mode
    lane: Lane


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Prompts that nobody waits for any more."""

    ids: list[int]


class Chats(msgspec.Struct, frozen=True, array_like=True, tag="chats"):
    """How many chats of this client wait for their first word, here or at a neighbour.

    Neighbours are engines of the same model on the same GPUs. Those that are about to be submitted
    count, too.
    """

    waiting: Annotated[int, msgspec.Meta(ge=0)]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """Asks for a ``Load`` now."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """The host's first message. ``session_len`` is in tokens, the limits are in prompts.

    ``tiling`` says how images may be cut before they are sent; without it they are sent as files.
    Hosts with the same ``device`` compute on the same GPUs; it is empty where there are none.
    """

    version: int
    model: str
    replica: int
    engine: str
    pid: int
    session_len: int
    max_running: int
    max_waiting: int
    tiling: Tiling | None = None
    device: str = ""


class Deltas(msgspec.Struct, frozen=True, array_like=True, tag="deltas"):
    """Pieces of streamed answers, in order."""

    items: list[tuple[int, str]]


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """Finished answers. A streamed one holds only the text that no ``Deltas`` carried."""

    items: list[tuple[int, Completion]]


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """Prompts that got no answer: id, error code, message and the field at fault, if one is."""

    items: list[tuple[int, str, str, str | None]]


class Load(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """How many prompts of all clients the engine works on, and how many wait."""

    running: int
    waiting: int


class Draining(msgspec.Struct, frozen=True, array_like=True, tag="draining"):
    """The host finishes what it has and takes nothing new."""


ToHost = Submit | Abort | Chats | Ping
FromHost = Hello | Deltas | Done | Failed | Load | Draining

M = TypeVar("M")
_encoder = msgspec.msgpack.Encoder()


def encode(message: ToHost | FromHost) -> bytearray:
    """The frame of a message. Raises: FrameTooLarge."""
    frame = bytearray(_LENGTH.size)
    _encoder.encode_into(message, frame, _LENGTH.size)
    size = len(frame) - _LENGTH.size
    if size > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"a message of {size} bytes does not fit a frame")
    _LENGTH.pack_into(frame, 0, size)
    return frame


class Frames(Generic[M]):
    """Turns a byte stream back into messages."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[M]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()
        self._start = self._end = 0
        """Where in the buffer is what came and was not decoded."""
        self._wanted = 0
        """The length of the frame that has begun, if that is known."""

    def feed(self, data: bytes | memoryview) -> list[M]:
        """Take the bytes that came and return the messages that are complete now.

        Raises: MalformedFrame; the stream cannot be used after it.
        """
        with memoryview(data) as rest:
            messages: list[M] = []
            taken = 0
            while taken < len(rest):
                room = self.room()
                count = min(len(room), len(rest) - taken)
                room[:count] = rest[taken : taken + count]
                taken += count
                messages += self.arrived(count)
            return messages

    def room(self) -> memoryview:
        """Where the next bytes are to be put, some or all of it; :meth:`arrived` says how many were.

        So that they are not copied once more.
        """
        if self._start:
            # What is left of the last bytes is the begin of a frame, mostly a short one.
            left = self._end - self._start
            self._buffer[:left] = self._buffer[self._start : self._end]
            self._start, self._end = 0, left
        # Who claims a large frame gets the room for it as the bytes come.
        needed = self._end + max(_ROOM_BYTES, min(self._wanted - self._end, self._end))
        if len(self._buffer) < needed or len(self._buffer) > max(needed, _KEPT_BYTES):
            larger = bytearray(needed)
            larger[: self._end] = memoryview(self._buffer)[: self._end]
            self._buffer = larger
        return memoryview(self._buffer)[self._end :]

    def arrived(self, count: int) -> list[M]:
        """So many bytes are in the room that was given; returns as ``feed``. Raises: MalformedFrame."""
        self._end += count
        messages: list[M] = []
        with memoryview(self._buffer) as view:
            while (end := self._frame_end()) is not None:
                body = view[self._start + _LENGTH.size : end]
                self._start = end
                messages.append(self._decode(body))
        if self._start == self._end:
            self._start = self._end = 0
        return messages

    def _frame_end(self) -> int | None:
        self._wanted = 0
        if self._end - self._start < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack_from(self._buffer, self._start)
        if size > MAX_FRAME_BYTES:
            raise MalformedFrame(f"a frame claims {size} bytes, more than {MAX_FRAME_BYTES}")
        length = _LENGTH.size + int(size)
        if self._start + length <= self._end:
            return self._start + length
        self._wanted = length
        return None

    def _decode(self, body: memoryview) -> M:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedFrame(f"a frame cannot be read: {error}") from None
        finally:
            body.release()


def frames_to_host() -> Frames[ToHost]:
    """A reader for the host's side."""
    return Frames(msgspec.msgpack.Decoder(ToHost))


def frames_from_host() -> Frames[FromHost]:
    """A reader for the client's side."""
    return Frames(msgspec.msgpack.Decoder(FromHost))


def submit_frames(
    prompts: Sequence[Prompt], mode: Mode, lane: Lane
) -> tuple[list[bytearray], list[int]]:
    """The frames that submit these prompts, and the ids of those too large for any frame."""
    frames: list[bytearray] = []
    too_large: list[int] = []
    pending = [list(group) for group in _groups(prompts)]
    while pending:
        group = pending.pop(0)
        try:
            frames.append(encode(Submit(group, mode, lane)))
        except FrameTooLarge:
            if len(group) == 1:
                too_large.append(group[0].id)
            else:
                half = len(group) // 2
                pending[:0] = [group[:half], group[half:]]
    return frames, too_large


def _groups(prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    """Cut where the images of a group reach the target size."""
    start, size = 0, 0
    for index, prompt in enumerate(prompts):
        if prompt.images:
            size += sum(len(image.data) for image in prompt.images)
        if size >= TARGET_FRAME_BYTES:
            yield prompts[start : index + 1]
            start, size = index + 1, 0
    if start < len(prompts):
        yield prompts[start:]


def model_slug(model: str) -> str:
    """A short folder name for a model; the digest keeps names apart that look alike."""
    readable = re.sub(r"[^a-z0-9._]+", "-", model.lower()).strip("-.")[:20]
    return f"{readable}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def replica_folder(run_dir: Path, model: str) -> Path:
    """The folder that holds the sockets of a model's replicas."""
    return run_dir / model_slug(model)


def socket_path(run_dir: Path, model: str, replica: int) -> Path:
    """Where a replica listens.

    Raises: ConfigurationError if the path is longer than a Unix socket's may be.
    """
    path = replica_folder(run_dir, model) / f"{replica}.sock"
    check_socket_path(path)
    return path


def check_socket_path(path: Path) -> None:
    """Raise ConfigurationError if the kernel would refuse a socket with this path."""
    size = len(str(path).encode())
    if size > _MAX_SOCKET_PATH:
        raise ConfigurationError(
            f"the socket path {path} has {size} bytes, the system allows {_MAX_SOCKET_PATH}; "
            "set a shorter run_dir"
        )
