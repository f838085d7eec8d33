"""What creates a caption job. Read with msgspec, for its parameters are those of a chat request."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from shared.captions import (
    MAX_PLACES,
    MAX_TEXT,
    CaptionSource,
    ImagePlace,
    Sample,
    Sync,
    parameters_of,
)
from shared.chat import GenerationParameters, explain
from shared.errors import InvalidJson, InvalidValue
from shared.quality import QualityGate

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TEXT)]
_SetName = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Metadata = Annotated[
    dict[Annotated[str, msgspec.Meta(max_length=64)], Annotated[str, msgspec.Meta(max_length=512)]],
    msgspec.Meta(max_length=16),
]


class OutputExpiry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When the output is to be deleted: an hour to thirty days after it was made."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, msgspec.Meta(ge=3600, le=2_592_000)]


class CreateCaptions(GenerationParameters, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /v1/captions``."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    images: str | ImagePlace | list[str | ImagePlace]
    prompt: _Text | None = None
    template: _Text | None = None
    system: _Text | None = None
    detail: Literal["auto", "low", "high"] = "auto"
    sync: bool | _SetName | Sync = False
    completion_window: Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,4}[mhd]$")] = "24h"
    metadata: _Metadata | None = None
    quality: QualityGate | None = None
    sample: Sample | None = None
    output_expires_after: OutputExpiry | None = None

    @property
    def places(self) -> list[ImagePlace]:
        """The places, in full."""
        given = self.images if isinstance(self.images, list) else [self.images]
        return [place_of(item) if isinstance(item, str) else item for item in given]

    @property
    def _sync(self) -> Sync | None:
        """How the set is synced, in full."""
        if isinstance(self.sync, bool):
            return Sync() if self.sync else None
        return Sync(name=self.sync) if isinstance(self.sync, str) else self.sync

    def source(self) -> CaptionSource:
        """The record of what is asked."""
        return CaptionSource(
            images=self.places,
            model=self.model,
            prompt=self.prompt,
            template=self.template,
            system=self.system,
            detail=self.detail,
            quality=self.quality,
            sample=self.sample,
            sync=self._sync,
            **parameters_of(self),
        )

    def check(self) -> None:
        """Raise the rules that one field's type cannot say. Raises: InvalidValue."""
        self.check_parameters()
        if self.quality is not None:
            self.quality.check()
        if (self.prompt is None) == (self.template is None):
            raise InvalidValue(
                "give either 'prompt', which is taken as it is, or 'template', in which "
                "{column} stands for each image's own text",
                param="prompt" if self.template is None else "template",
            )
        if self.template is not None and not self.source().columns:
            raise InvalidValue(
                "the template names no {column}; send a text without any as 'prompt'",
                param="template",
            )
        if self.sample is not None and self._sync is not None:
            raise InvalidValue(
                "a sample of a set is not synced; leave out either 'sync' or 'sample'",
                param="sample",
            )
        if not 0 < len(self.places) <= MAX_PLACES:
            raise InvalidValue(f"images: name 1 to {MAX_PLACES} places", param="images")


def place_of(text: str) -> ImagePlace:
    """The place that a mere string means: an upload's id, or a path."""
    return ImagePlace(file=text) if text.startswith("file-") else ImagePlace(path=text)


_decoder = msgspec.json.Decoder(CreateCaptions)


def parse_captions(body: bytes) -> CreateCaptions:
    """Read and check the JSON body.

    Raises: InvalidJson, UnsupportedParameter or InvalidValue, with ``param`` set to the field.
    """
    try:
        asked = _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise explain(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJson(f"the body is not valid JSON: {error}") from None
    asked.check()
    return asked
