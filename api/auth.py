"""Who is asking: API keys as ``Authorization: Bearer``, or nobody in particular on one machine.

With keys, each belongs to an owner, and an owner sees only its own files, batches and models.
Keys are long random secrets of which only the SHA-256 digest is stored, and the digest of what a
client sent is what is compared, so the time that takes tells nothing about a key.

Without any key everybody who reaches the server is the owner ``local``. That is safe only as long
as nobody else can reach it, so the server then binds to loopback, and here every request must

- come from a loopback address, not through a proxy that says it forwards for somebody,
- name a loopback host in ``Host``: a web page whose domain its owner re-points to 127.0.0.1 ("DNS
  rebinding") is, for the browser, still of that domain, and gives itself away here,
- and not carry the ``Origin`` of another site: a browser lets any page *send* simple POSTs across
  origins (an upload is one), it only keeps the answer from the page.

Once there has been a key, requests need one, even if all have been revoked since.

``/metrics`` tells of everybody's work, so not every owner may read it: see ``api.metrics_readers``.
The pages for a browser are the same for everybody and need no key: it cannot send one before it has
loaded them, and they ask for one themselves.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from flask import Flask, request

from api.current import set_owner, stores
from shared.errors import Forbidden, NotAuthenticated

LOCAL_OWNER = "local"
METRICS_OWNER = "metrics"
METRICS_ENDPOINT = "metrics.scrape"
PAGES = "pages"
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


def register(app: Flask) -> None:
    """Authenticate every request, except those of health probes."""
    app.before_request(_authenticate)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a name or an address of this machine itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _authenticate() -> None:
    if request.path in _OPEN_PATHS:
        return
    if stores().keys.required():
        if request.blueprint == PAGES:
            return
        if request.endpoint == METRICS_ENDPOINT:
            _authenticate_reader()
            return
        set_owner(stores().keys.authenticate(_bearer()).owner)
        return
    _require_local()
    set_owner(LOCAL_OWNER)


def _authenticate_reader() -> None:
    """Judge by the endpoint, not the path, which may be written in more than one way."""
    readers = stores().settings.api.metrics_readers
    if readers == "anyone":
        return
    owner = stores().keys.authenticate(_bearer()).owner
    if readers == "metrics" and owner != METRICS_OWNER:
        raise Forbidden(
            f"only keys of the owner '{METRICS_OWNER}' may read /metrics: "
            f"make one with 'vlmq keys create {METRICS_OWNER}', or set api.metrics_readers"
        )


def _bearer() -> str:
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise NotAuthenticated
    return secret.strip()


def _require_local() -> None:
    if not is_loopback(stores().settings.api.host):
        raise NotAuthenticated("this server has no API keys; make one with 'vlmq keys create'")
    # An empty address is that of a Unix socket's peer.
    if request.remote_addr and not is_loopback(request.remote_addr):
        raise NotAuthenticated("without API keys only this machine itself may use the server")
    if any(name in request.headers for name in _FORWARDED):
        raise NotAuthenticated("behind a proxy the server needs API keys: 'vlmq keys create'")
    host = request.headers.get("Host", "")
    if not is_loopback(_hostname(host)):
        raise Forbidden("without API keys the server answers only to localhost and 127.0.0.1")
    origin = request.headers.get("Origin")
    if origin is not None and _netloc(origin) != host.lower():
        raise Forbidden("without API keys web pages of other sites may not use the server")


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
