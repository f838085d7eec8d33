"""Frames, socket names and how prompts are packed."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigurationError
from workers.inference.engines import wire
from workers.inference.engines.base import Completion, Image, Prompt, Sampling, Turn

MESSAGES: list[wire.ToHost | wire.FromHost] = [
    wire.Submit(
        [
            Prompt(
                7,
                [Turn("system", ["be brief"]), Turn("user", [0, "what is it?"])],
                Sampling(max_tokens=5, stop=["."], seed=3),
                [Image(b"\x00\xff" * 50, "rgb", 10, 5)],
            )
        ],
        "stream",
        "chat",
    ),
    wire.Abort([1, 2, 2**40]),
    wire.Ping(),
    wire.Hello(1, "m", 0, "echo", 123, 8192, 32, 4096),
    wire.Deltas([(1, "ä"), (2, "")]),
    wire.Done([(1, Completion("text", "length", 9, 5))]),
    wire.Failed([(1, "engine_busy", "full", None), (2, "invalid_value", "bad", "stop")]),
    wire.Load(3, 4),
    wire.Draining(),
]
TO_HOST = (wire.Submit, wire.Abort, wire.Ping)


@given(st.lists(st.integers(1, 200), max_size=60))
def test_messages_survive_any_cutting_of_the_stream(sizes: list[int]) -> None:
    """What goes in comes out, in order, wherever the reads happen to end."""
    for kinds, frames in (
        ([m for m in MESSAGES if isinstance(m, TO_HOST)], wire.frames_to_host()),
        ([m for m in MESSAGES if not isinstance(m, TO_HOST)], wire.frames_from_host()),
    ):
        stream = b"".join(wire.encode(message) for message in kinds)
        out: list[object] = []
        for size in [*sizes, len(stream)]:
            out += frames.feed(stream[:size])
            stream = stream[size:]
        out += frames.feed(stream)
        assert out == kinds


@given(st.lists(st.integers(1, 5000), max_size=60), st.lists(st.integers(0, 400_000), max_size=4))
def test_messages_survive_any_filling_of_the_room(sizes: list[int], images: list[int]) -> None:
    """As a socket puts bytes where it is told to; the room grows with frames that do not fit it."""
    asked = [
        wire.Submit([Prompt(0, [], Sampling(), [Image(bytes([n]) * size)])], "whole", "batch")
        for n, size in enumerate(images)
    ]
    stream = memoryview(b"".join(map(wire.encode, [wire.Ping(), *asked, wire.Abort([3])])))
    frames, out = wire.frames_to_host(), list[object]()
    for size in [*sizes, *[60_000] * (len(stream) // 60_000 + 1)]:
        room = frames.room()
        taken = min(size, len(room), len(stream))
        room[:taken] = stream[:taken]
        stream = stream[taken:]
        if taken:
            out += frames.arrived(taken)
    assert out == [wire.Ping(), *asked, wire.Abort([3])]


def test_who_only_claims_to_send_much_gets_little_room() -> None:
    """A frame's length is said by the other side; memory is for what came."""
    frames = wire.frames_to_host()
    assert frames.feed(struct.pack(">I", wire.MAX_FRAME_BYTES) + bytes(1000)) == []
    assert len(frames.room()) < 1 << 20


@pytest.mark.parametrize(
    "rubbish",
    [
        b"\x00\x00\x00\x02\xc1\xc1",
        b"\x00\x00\x00\x00",
        struct.pack(">I", wire.MAX_FRAME_BYTES + 1),
        bytes(wire.encode(wire.Load(1, 1))),
        b"\x00\x00\x00\x0a\x92\xa6submit\x01\x02",
    ],
    ids=["not msgpack", "empty", "too long", "wrong direction", "wrong shape"],
)
def test_rubbish_is_a_malformed_frame(rubbish: bytes) -> None:
    """No other exception comes out, and none is missing."""
    with pytest.raises(wire.MalformedFrame):
        wire.frames_to_host().feed(rubbish)


def test_a_large_frame_is_refused_before_it_is_read() -> None:
    """Four bytes are enough to hang up on a peer that claims too much."""
    with pytest.raises(wire.MalformedFrame):
        wire.frames_to_host().feed(b"\xff\xff\xff\xff")


def test_prompts_with_images_are_spread_over_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames stay near their target, prompts that fit no frame are named, none is lost."""
    monkeypatch.setattr(wire, "TARGET_FRAME_BYTES", 3000)
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 5000)
    sizes = [1000, 1000, 1500, 9000, 10, 2000, 4000]
    prompts = [
        Prompt(i, [Turn("user", [0])], Sampling(), [Image(bytes(size))])
        for i, size in enumerate(sizes)
    ]
    frames, too_large = wire.submit_frames(prompts, "whole", "batch")
    assert too_large == [3]
    reader = wire.frames_to_host()
    submits = [message for frame in frames for message in reader.feed(bytes(frame))]
    ids = [p.id for submit in submits if isinstance(submit, wire.Submit) for p in submit.prompts]
    assert ids == [0, 1, 2, 4, 5, 6]
    assert len(frames) > 1


def test_long_texts_are_split_when_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only images are weighed beforehand; too large a frame of texts is halved."""
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 1000)
    prompts = [Prompt(i, [Turn("user", ["x" * 300])], Sampling()) for i in range(9)]
    frames, too_large = wire.submit_frames(prompts, "whole", "batch")
    assert not too_large
    assert len(frames) >= 3
    assert all(len(frame) <= 1004 for frame in frames)


def test_models_that_look_alike_have_folders_of_their_own() -> None:
    """Characters a file name cannot hold are replaced, the digest keeps names apart."""
    names = ["a/b", "a:b", "A/b", "ft:base:suffix:1", "../../etc", "x" * 256, "模型", ""]
    slugs = [wire.model_slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all("/" not in slug and not slug.startswith(".") for slug in slugs)
    assert max(map(len, slugs)) <= 29


def test_a_socket_path_the_system_cannot_hold_is_a_configuration_error() -> None:
    """The message says what to change."""
    assert wire.socket_path(Path("/run/vlmq"), "m", 3).name == "3.sock"
    with pytest.raises(ConfigurationError, match="run_dir"):
        wire.socket_path(Path("/" + "deep/" * 30), "m", 0)
