"""``/v1/models``: what may be named as ``model``. Linking and removing is done on the machine."""

from __future__ import annotations

from flask import Blueprint, Response

from api import current
from api.bodies import require_no_query
from api.errors import json_response
from api.schemas.models import ModelObject
from shared.errors import Forbidden

blueprint = Blueprint("models", __name__)


@blueprint.get("/v1/models")
def list_models() -> Response:
    """All models the owner may use; this list has no pages."""
    require_no_query()
    found = [record for record in current.stores().models.list() if current.visible(record)]
    data = [ModelObject.of(record).model_dump() for record in found]
    return json_response({"object": "list", "data": data})


@blueprint.get("/v1/models/<path:name>")
def retrieve(name: str) -> Response:
    """One model."""
    require_no_query()
    return json_response(ModelObject.of(current.visible_model(name)).model_dump())


@blueprint.delete("/v1/models/<path:name>")
def delete(name: str) -> Response:
    """Refuse: only fine-tuned models are deleted over HTTP, and there are none yet."""
    require_no_query()
    current.visible_model(name)
    raise Forbidden(
        f"the model '{name}' was linked on the server; remove it there with 'vlmq models remove'",
        param="model",
    )
