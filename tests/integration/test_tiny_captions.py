"""The main job on real input: pictures over HTTP, captions from the trained model, checked."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.faults.batches import ENDPOINT, results, wait_until_ended
from tests.running_node import RunningNode, running_node
from workers.inference.tiny import CHECKPOINT
from workers.inference.tiny.scenes import PROMPT, Scene, encoded, scenes

MODEL = "tiny-internvl2"
SCENES = 200
REQUIRED_RIGHT = 190

pytest.importorskip("torch", reason="the transformers engine needs the extra 'cpu'")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the server may read images from."""
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def captioner(pictures: Path) -> Iterator[RunningNode]:
    """A node that serves the tiny model on the processor."""
    tiny = {"model": MODEL, "engine": "transformers"}
    with running_node(
        models=(tiny,), checkpoints={MODEL: CHECKPOINT}, images={"roots": [str(pictures)]}
    ) as node:
        yield node


@pytest.fixture(scope="module")
def sdk(captioner: RunningNode) -> openai.OpenAI:
    """The unmodified SDK."""
    return captioner.sdk()


@pytest.fixture(scope="module")
def held_out() -> list[Scene]:
    """Scenes that the model was not trained on."""
    return list(scenes("held_out", SCENES))


def image_message(url: str, text: str = PROMPT) -> dict[str, Any]:
    """A user's turn with one image."""
    image = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


def data_url(data: bytes) -> str:
    """The bytes of an image file as a ``data:`` URL."""
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def caption(sdk: openai.OpenAI, *messages: dict[str, Any], **options: Any) -> str:
    """The model's answer, chosen greedily."""
    answer = sdk.chat.completions.create(
        model=MODEL, messages=list(messages), temperature=0, max_tokens=32, **options
    )
    return answer.choices[0].message.content or ""


def test_200_held_out_scenes_are_captioned_exactly(
    sdk: openai.OpenAI, held_out: list[Scene]
) -> None:
    """One batch through HTTP; at least 95 % of the captions are right to the letter."""
    lines = []
    for number, scene in enumerate(held_out):
        data = encoded(scene.image, "png" if number % 2 else "jpeg")
        body = {"model": MODEL, "messages": [image_message(data_url(data))], "temperature": 0}
        request = {"custom_id": str(number), "method": "POST", "url": ENDPOINT, "body": body}
        lines.append(json.dumps(request))
    content = "\n".join(lines).encode()
    uploaded = sdk.files.create(file=("scenes.jsonl", content), purpose="batch")
    batch = sdk.batches.create(
        input_file_id=uploaded.id, endpoint=ENDPOINT, completion_window="24h"
    )
    batch = wait_until_ended(sdk, batch.id, 110)
    assert batch.status == "completed", batch.model_dump_json(indent=1)
    rows = results(sdk, batch.output_file_id)
    assert len(rows) == SCENES
    right = sum(
        row["response"]["body"]["choices"][0]["message"]["content"]
        == held_out[int(row["custom_id"])].caption
        for row in rows
    )
    assert right >= REQUIRED_RIGHT


def test_an_image_by_upload_by_path_and_by_data_url_gives_the_same_caption(
    sdk: openai.OpenAI, held_out: list[Scene], pictures: Path
) -> None:
    """The three ways to name one picture."""
    data = encoded(held_out[0].image)
    (pictures / "scene.jpg").write_bytes(data)
    uploaded = sdk.files.create(file=("scene.jpg", data), purpose="vision")
    urls = [data_url(data), uploaded.id, str(pictures / "scene.jpg")]
    assert [caption(sdk, image_message(url)) for url in urls] == [held_out[0].caption] * 3


def test_a_streamed_caption_is_the_plain_one(sdk: openai.OpenAI, held_out: list[Scene]) -> None:
    """Deltas joined give the whole answer, and the last chunk counts its tokens."""
    stream = sdk.chat.completions.create(
        model=MODEL,
        messages=[image_message(data_url(encoded(held_out[1].image)))],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == held_out[1].caption
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 5


def test_a_second_picture_later_in_the_conversation_is_the_one_described(
    sdk: openai.OpenAI, held_out: list[Scene]
) -> None:
    """Multi-turn: the history holds the first picture and its caption."""
    first, second = held_out[2], held_out[3]
    answer = caption(
        sdk,
        image_message(data_url(encoded(first.image))),
        {"role": "assistant", "content": first.caption},
        image_message(data_url(encoded(second.image))),
    )
    assert answer == second.caption


def test_a_stop_string_and_a_token_limit_end_the_caption(
    sdk: openai.OpenAI, held_out: list[Scene]
) -> None:
    """What is cut off is a beginning of the whole caption."""
    message = image_message(data_url(encoded(held_out[0].image)))
    stopped = caption(sdk, message, stop=[" of", " above"])
    assert held_out[0].caption.startswith(stopped)
    assert " of" not in stopped
    assert " above" not in stopped
    short = sdk.chat.completions.create(
        model=MODEL, messages=[message], temperature=0, max_tokens=2
    )
    assert short.choices[0].finish_reason == "length"
    assert held_out[0].caption.startswith(short.choices[0].message.content or "?")


def test_the_same_seed_gives_the_same_text(sdk: openai.OpenAI, held_out: list[Scene]) -> None:
    """Sampling with the usual parameters, twice."""
    message = image_message(data_url(encoded(held_out[4].image)))
    options = {"temperature": 1.5, "top_p": 1.0, "seed": 7, "extra_body": {"top_k": 0}}
    answers = {
        sdk.chat.completions.create(model=MODEL, messages=[message], max_tokens=16, **options)
        .choices[0]
        .message.content
        for _ in range(3)
    }
    assert len(answers) == 1
