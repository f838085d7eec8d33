"""What each error is on the wire, and what the server does with its connections."""

from __future__ import annotations

import socket
import struct

import pytest

from api.auth import is_loopback
from api.connection import STALL_S, bound_stalls
from shared import errors
from shared.statuses import error_body, status_of, type_of


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (errors.ImageTruncated(), 400, "invalid_request_error"),
        (errors.ModelNotFound(), 404, "invalid_request_error"),
        (errors.NotAuthenticated(), 401, "authentication_error"),
        (errors.Forbidden(), 403, "permission_error"),
        (errors.RateLimited(), 429, "rate_limit_error"),
        (errors.EngineSetupFailed(), 500, "server_error"),
        (errors.EngineBusy(), 503, "server_error"),
        (errors.LeaseLost(), 500, "server_error"),
    ],
)
def test_an_error_without_an_entry_has_that_of_its_kin(
    error: errors.VlmqError, status: int, kind: str
) -> None:
    """The nearest class above it that has one decides."""
    assert status_of(error) == status
    assert type_of(status) == kind


@pytest.mark.parametrize("kind", sorted(errors.BY_CODE.values(), key=lambda kind: kind.code))
def test_every_error_has_a_whole_body(kind: type[errors.VlmqError]) -> None:
    """All four keys, the code of its class, and a status that fits ``retryable``."""
    body = error_body(kind(param="x"))["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert (body["code"], body["param"]) == (kind.code, "x")
    assert body["message"]
    if kind.retryable:
        # Others are never sent again, neither by OpenAI's SDK nor by batches.
        assert status_of(kind()) in {409, 429} or status_of(kind()) >= 500


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("LocalHost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("localhost.example", False),
        ("127.0.0.1.nip.io", False),
        ("", False),
    ],
)
def test_loopback_is_this_machine_and_nothing_that_resembles_it(host: str, loopback: bool) -> None:
    """Names are not resolved: what they resolve to may change."""
    assert is_loopback(host) is loopback


def test_accepted_connections_inherit_the_time_outs() -> None:
    """So a client that stalls anywhere gives its thread back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        bound_stalls(listener)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                raw = accepted.getsockopt(socket.SOL_SOCKET, option, 16)
                assert struct.unpack("ll", raw) == (STALL_S, 0)
