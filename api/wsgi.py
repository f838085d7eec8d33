"""For those who run their own gunicorn; ``python -m api.server`` needs none of this.

``gunicorn --worker-class gthread --threads 320 "api.wsgi:application('/etc/vlmq/node.toml')"``

Do not preload it: each process needs connections of its own. Without API keys the application
answers only to this machine itself, whatever gunicorn is bound to.
"""

from __future__ import annotations

from pathlib import Path

from flask import Flask

from api.app import create_app
from shared import log
from shared.settings import load_settings
from shared.stores import Stores


def application(config: str | None = None) -> Flask:
    """The WSGI application for the configuration file ``config``. Raises: ConfigurationError."""
    settings = load_settings(Path(config) if config else None)
    log.configure("api", level=settings.log_level)
    return create_app(Stores.connect(settings))
