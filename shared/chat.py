"""The chat request, as HTTP bodies and batch lines carry it, and the completion that answers it.

Parsed with msgspec rather than pydantic because a batch parses millions of them
(``docs/decisions/0002-msgspec-for-requests.md``). The API and the consumers use this one
definition, so a body is valid in a batch exactly when it is valid over HTTP.

Source: OpenAI's public API specification 2.3.0, ``CreateChatCompletionRequest``; ``top_k``,
``repetition_penalty`` and ``min_new_tokens`` are extensions of ours.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec

from shared.errors import InvalidJson, InvalidRequest, InvalidValue, UnsupportedParameter

MAX_STOP_STRINGS = 16


class TextPart(
    msgspec.Struct, frozen=True, tag_field="type", tag="text", forbid_unknown_fields=True
):
    """A piece of text."""

    text: str


class ImageUrl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an image is: ``data:``, ``http(s)://``, an uploaded file's id, or a path under a root."""

    url: Annotated[str, msgspec.Meta(min_length=1)]
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(
    msgspec.Struct, frozen=True, tag_field="type", tag="image_url", forbid_unknown_fields=True
):
    """An image."""

    image_url: ImageUrl


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | ImagePart]
    name: str | None = None


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``include_usage`` asks for a last chunk with the token counts."""

    include_usage: bool = False


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Only plain text is produced."""

    type: Literal["text"]


class GenerationParameters(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True
):
    """How to write an answer. ``None`` means: the model's default."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    min_new_tokens: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, under its new name or its old one."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def check_parameters(self) -> None:
        """Raise the rules that one field's type cannot say.

        Raises: InvalidValue with the field's name.
        """
        if self.stop is not None:
            stops = self.stop_strings
            if len(stops) > MAX_STOP_STRINGS or not all(stops):
                raise InvalidValue(
                    f"stop takes up to {MAX_STOP_STRINGS} strings, none of them empty",
                    param="stop",
                )


class ChatRequest(GenerationParameters, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/chat/completions``."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None

    @property
    def image_count(self) -> int:
        """How many images its messages hold."""
        return sum(
            isinstance(part, ImagePart)
            for message in self.messages
            if not isinstance(message.content, str)
            for part in message.content
        )

    @property
    def has_images(self) -> bool:
        """Whether any message holds an image."""
        return self.image_count > 0

    def check(self) -> None:
        """Raise the rules that one field's type cannot say.

        Raises: InvalidValue with the field's name.
        """
        for index, message in enumerate(self.messages):
            if not isinstance(message.content, str):
                _check_parts(message.role, message.content, f"messages[{index}].content")
        self.check_parameters()
        if self.stream_options is not None and not self.stream:
            raise InvalidValue("stream_options needs stream: true", param="stream_options")


def _check_parts(role: str, parts: list[TextPart | ImagePart], where: str) -> None:
    if not parts:
        raise InvalidValue("a message needs at least one part", param=where)
    if role == "user":
        return
    for index, part in enumerate(parts):
        if isinstance(part, ImagePart):
            raise InvalidValue(
                f"only user messages may hold images, this one is from '{role}'",
                param=f"{where}[{index}]",
            )


_decoder = msgspec.json.Decoder(ChatRequest)
_UNKNOWN_FIELD = re.compile(r"unknown field `(?P<field>[^`]+)`")
_PATH = re.compile(r" - at `\$(?P<path>[^`]*)`")


def parse_chat_request(body: bytes | memoryview) -> ChatRequest:
    """Read and check the JSON body of a chat request.

    Raises: InvalidJson, UnsupportedParameter or InvalidValue, with ``param`` set to the field.
    """
    try:
        request = _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise explain(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidJson(f"the body is not valid JSON: {error}") from None
    request.check()
    return request


def explain(error: msgspec.ValidationError, root: str = "") -> InvalidRequest:
    """Turn msgspec's complaint into ours, naming the field below ``root`` (``""`` or ``body.``)."""
    text = str(error)
    at = _PATH.search(text)
    path = at["path"].lstrip(".") if at else ""
    reason = _PATH.sub("", text)
    unknown = _UNKNOWN_FIELD.search(reason)
    if unknown:
        param = _below(root, path, unknown["field"])
        return UnsupportedParameter(f"the parameter '{param}' is not supported", param=param)
    missing = re.search(r"missing required field `([^`]+)`", reason)
    if missing:
        param = _below(root, path, missing[1])
        return InvalidValue(f"the field '{param}' is required", param=param)
    path = path.removeprefix(root)
    return InvalidValue(f"{path or 'the body'}: {reason}", param=path or None)


def _below(root: str, path: str, field: str) -> str:
    return f"{path}.{field}".removeprefix(".").removeprefix(root)


class Usage(msgspec.Struct, frozen=True):
    """Token counts, image tokens included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(msgspec.Struct, frozen=True):
    """The answer's text."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Choice(msgspec.Struct, frozen=True):
    """The one choice there is."""

    message: AnswerMessage
    finish_reason: str
    index: int = 0
    logprobs: None = None


class ChatCompletion(msgspec.Struct, frozen=True):
    """The body of an answer that is not streamed."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


def completion_body(
    *,
    completion_id: str,
    created: int,
    model: str,
    text: str,
    finish_reason: str,
    prompt_tokens: int,
    completion_tokens: int,
) -> ChatCompletion:
    """Build the answer to a chat request; ``created`` is in Unix seconds."""
    return ChatCompletion(
        id=completion_id,
        created=created,
        model=model,
        choices=[Choice(AnswerMessage(text), finish_reason)],
        usage=Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens),
    )


def encode(value: Any) -> bytes:
    """JSON bytes of any of this module's structs."""
    return msgspec.json.encode(value)
