"""``/v1/models``: what may be named as ``model``.

Models are linked on the machine, or by fine-tunes; only the latter are deleted over HTTP.
"""

from __future__ import annotations

from flask import Blueprint, Response

from api import current
from api.bodies import require_no_query
from api.errors import json_response
from api.schemas.models import DeletedModel, ModelObject
from shared.errors import Forbidden, NotFound

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
    """Forget a model that a fine-tune of this owner made. Its weights stay with the job."""
    require_no_query()
    record = current.visible_model(name)
    if record.job is None:
        raise Forbidden(
            f"the model '{name}' was linked on the server; remove it there with 'vlmq models "
            "remove'",
            param="model",
        )
    try:
        # First, so that a deletion that was cut short can be asked for again.
        current.stores().finetunes.forget_checkpoint(current.owner(), record.job, name)
    except NotFound:
        # Somebody else's job, or one that is deleted; the model's record says whose it is.
        if record.visible_to != current.owner():
            raise Forbidden(
                f"the model '{name}' was made by somebody else's fine-tune; its owner may delete "
                "it, or the operator by 'vlmq models remove'",
                param="model",
            ) from None
    current.stores().models.remove(name)
    return json_response(DeletedModel(id=name).model_dump())
