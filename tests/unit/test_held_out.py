"""The comparison asks what training would have taught: each image in front of its own question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.datasets import llava, prepared, write_images
from workers.training.compare import _request
from workers.training.held_out import read_held_out


def said(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)
    ]


def asked(job: Path, conversation: list[dict[str, str]], image: str | None) -> list[dict[str, Any]]:
    """The messages that the models get of a row with this conversation."""
    job.parent.mkdir(exist_ok=True)
    photos = job.parent / "photos"
    write_images(photos, 6)
    validation = job.parent / "validation.json"
    row = {**llava(image), "conversations": conversation}
    validation.write_text(json.dumps([row]))
    training = [llava(f"{number}.jpg") for number in range(1, 6)]
    prepared(job, training, folder=photos, validation=validation)
    (row_,) = read_held_out(job, 10)
    messages: list[dict[str, Any]] = json.loads(_request(0, row_, "m"))["body"]["messages"]
    return messages


def test_an_image_of_the_first_question(tmp_path: Path) -> None:
    (message,) = asked(tmp_path / "job", said("What?\n<image>", "A cup"), "0.jpg")
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert message["content"][1]["text"] == "What?"


def test_an_image_of_a_later_question(tmp_path: Path) -> None:
    messages = asked(tmp_path / "job", said("Hi", "Yes?", "<image>What?", "A cup"), "0.jpg")
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"] == "Hi"
    assert [part["type"] for part in messages[2]["content"]] == ["image_url", "text"]


def test_an_image_without_words_and_words_without_image(tmp_path: Path) -> None:
    (message,) = asked(tmp_path / "a" / "job", said("<image>", "A cup"), "0.jpg")
    assert [part["type"] for part in message["content"]] == ["image_url"]
    (message,) = asked(tmp_path / "b" / "job", said("What?", "A cup"), None)
    assert message["content"] == "What?"
