"""Fixtures of the HTTP tests: one API and Valkey per module, and the SDK pointed at it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import openai
import pytest

from shared.stores import Stores
from tests.integration.api_server import ApiServer, StartApi, running_api


@contextlib.contextmanager
def connected(server: ApiServer) -> Iterator[Stores]:
    """Stores beside the server's, to arrange things and to look at them."""
    stores = Stores.connect(server.settings)
    try:
        yield stores
    finally:
        stores.close()


@pytest.fixture(scope="module")
def api() -> Iterator[ApiServer]:
    """A server without API keys."""
    with running_api(max_body_bytes=1 << 20, max_upload_bytes=8 << 20) as server:
        yield server


@pytest.fixture(scope="module")
def stores(api: ApiServer) -> Iterator[Stores]:
    """Stores beside the server's."""
    with connected(api) as found:
        yield found


@pytest.fixture(scope="module")
def sdk(api: ApiServer) -> openai.OpenAI:
    """The SDK, pointed at the server."""
    return api.client()


@pytest.fixture(scope="module")
def start_api() -> StartApi:
    """Start servers with other settings, as context managers."""
    return running_api


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here leaves this machine."""
    for name in list(os.environ):
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name)
