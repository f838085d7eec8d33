"""What a training format needs of a row beside the caption: the question, and where the image is."""

from __future__ import annotations

import base64

import msgspec

from cli.export.images import Images, is_inline, media_type
from cli.export.names import Names, file_path
from cli.export.writing import LeftOut
from shared.chat import ImagePart, Message, TextPart
from shared.result_rows import ResultRow, images_of


class Asked:
    """Reads the requests of rows.

    ``prompt`` takes the place of the text of the last question. With ``embed`` images are put into
    the row as ``data:`` URLs.
    """

    def __init__(self, names: Names, *, prompt: str | None, embed: Images | None = None) -> None:
        self._names = names
        self._prompt = prompt
        self._embed = embed

    def messages(self, row: ResultRow) -> list[Message]:
        """The request's messages. Raises: LeftOut if they are not known."""
        if not row.messages:
            raise LeftOut("request_unreadable", "what was asked cannot be read")
        if self._prompt is None:
            if row.prompt is None:
                raise LeftOut(
                    "prompt_unknown",
                    "the question was made of sidecar files, which are not read again; say with "
                    "--prompt what to write in its place",
                )
            return row.messages
        return _with_prompt(row.messages, self._prompt)

    def only_image(self, row: ResultRow, messages: list[Message]) -> str | None:
        """The path or URL of the only image, if there is one. Raises: LeftOut."""
        urls = images_of(messages)
        if len(urls) > 1:
            raise LeftOut("several_images", f"the request shows {len(urls)} images")
        if not urls:
            return None
        if is_inline(urls[0]):
            raise LeftOut(
                "image_in_request",
                "the image is in the request itself, and this format names files; the formats "
                "openai and webdataset hold it",
            )
        return self._names.text(file_path(urls[0]))

    def address(self, row: ResultRow, url: str) -> str:
        """What a row says where an image is. Raises: LeftOut if it is to be read and cannot be."""
        if is_inline(url):
            return url
        if self._embed is None:
            return self._names.text(url)
        data = self._embed.read(row, url)
        return f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"


def answer_of(row: ResultRow) -> Message:
    """The caption as the message to learn. Raises: LeftOut if it is not worth it."""
    if row.finish_reason == "length":
        raise LeftOut(
            "answer_cut", "the answer was cut at max_tokens; what is learned would end like it"
        )
    if not row.caption or not row.caption.strip():
        raise LeftOut("empty_answer", "the answer is empty")
    return Message("assistant", row.caption)


def _with_prompt(messages: list[Message], prompt: str) -> list[Message]:
    asked = list(messages)
    for index in reversed(range(len(asked))):
        message = asked[index]
        if message.role != "user":
            continue
        content: str | list[TextPart | ImagePart] = prompt
        if not isinstance(message.content, str):
            shown = [part for part in message.content if isinstance(part, ImagePart)]
            content = [*shown, TextPart(prompt)]
        asked[index] = msgspec.structs.replace(message, content=content)
        return asked
    return asked
