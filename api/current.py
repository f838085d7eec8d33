"""What the request being answered may use: the process's stores, and whose request it is."""

from __future__ import annotations

from typing import cast

from flask import Flask, current_app, g

from shared.errors import ModelNotFound
from shared.models import ModelRecord
from shared.stores import Stores

_KEY = "vlmq"


def provide(app: Flask, stores: Stores) -> None:
    """Give ``app`` its stores."""
    app.extensions[_KEY] = stores


def stores() -> Stores:
    """The stores of this process."""
    return cast(Stores, current_app.extensions[_KEY])


def set_owner(owner: str) -> None:
    """Say whose request this is; called by :mod:`api.auth` alone."""
    g.owner = owner


def owner() -> str:
    """Whose request this is. It fails where no authentication took place."""
    return cast(str, g.owner)


def visible(record: ModelRecord) -> bool:
    """Whether the owner of this request may use a model; nobody may while it is a candidate."""
    return not record.candidate and record.visible_to in (None, owner())


def visible_model(name: str) -> ModelRecord:
    """A model that this owner may use. Raises: ModelNotFound, for somebody else's too."""
    record = stores().models.get(name)
    if not visible(record):
        raise ModelNotFound(f"there is no model '{name}'", param="model")
    return record
