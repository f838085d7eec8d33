"""``/``: a page to chat with models in a browser, its files beside it under ``/pages/``.

The page is a client of ``/v1`` like any other: nothing in it is made for whoever asks. Its policy
lets a browser load and ask nothing but this server, and run nothing that an answer might contain.
"""

from __future__ import annotations

from importlib import resources

from flask import Blueprint, Response, request

from api.auth import PAGES
from shared.errors import NotFound

blueprint = Blueprint(PAGES, __name__)

_PARTS = {"chat.css": "text/css", "chat.js": "text/javascript"}
_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)
_HEADERS = {
    "content-security-policy": "; ".join(_POLICY),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    # Asked for every time, and sent again only when a new version of vlmq has another.
    "cache-control": "no-cache",
}


@blueprint.get("/")
def chat() -> Response:
    """The chat."""
    return _file("chat.html", "text/html")


@blueprint.get("/pages/<name>")
def part(name: str) -> Response:
    """A file that a page needs. Raises: NotFound."""
    if name not in _PARTS:
        raise NotFound(f"there is no page '{name}'")
    return _file(name, _PARTS[name])


def _file(name: str, kind: str) -> Response:
    content = (resources.files("api") / "pages" / name).read_bytes()
    response = Response(content, mimetype=kind, headers=_HEADERS)
    response.add_etag()
    response.make_conditional(request)
    return response
