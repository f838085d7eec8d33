"""The composition root of the HTTP API: one Flask application around the stores it is given."""

from __future__ import annotations

from flask import Flask

from api import auth, current, errors
from api.routes import batches, captions, chat, files, finetunes, health, metrics, models, pages
from shared.stores import Stores


def create_app(stores: Stores) -> Flask:
    """The WSGI application. It holds ``stores`` but does not close them."""
    app = Flask("vlmq", static_folder=None)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    current.provide(app, stores)
    # First, so that a refused request has an id as well.
    errors.register(app)
    auth.register(app)
    for module in (chat, files, batches, captions, finetunes, models, health, metrics, pages):
        app.register_blueprint(module.blueprint)
    return app
