"""Fetch an image over http(s) without becoming a way into the network the server stands in.

The policy, for the first URL and for every redirect alike:

- every address that the host's name resolves to is public, and the connection goes to one of the
  addresses that were checked: the name is not resolved a second time;
- ports 80 and 443 only, no credentials in the URL, no step from https down to http;
- proxies and credentials from the environment are not used; only GET; no cookies;
- the bytes are counted as they come, compressed answers are refused, and one deadline covers
  redirects, connecting and reading, however slowly the other side drips.

Hosts named in ``images.allow_private_hosts`` may be private and use any port; the rest holds.
Resolving a name is bounded by the system's resolver, not by the deadline.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import httpcore
import httpx

from shared.errors import ImageDownloadFailed, ImageForbidden, ImageNotFound, ImageTooLarge
from shared.settings import ImageSettings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[Address]]
"""From a host and port to its addresses; raises OSError if there are none."""

MAX_CONNECTIONS = 64
MAX_URL_CHARACTERS = 8192
MAX_PORT = 65535
KEEP_IDLE_S = 5.0
_DEFAULT_PORTS = {"http": 80, "https": 443}
_DIGITS = re.compile(r"[0-9]{1,20}")
_HOST = re.compile(r"[^%.][^%]*")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MISSING = frozenset({404, 410})
_HEADERS = [
    (b"User-Agent", b"vlmq"),
    (b"Accept", b"image/*"),
    (b"Accept-Encoding", b"identity"),
]


# --- which addresses --------------------------------------------------------------------------

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_REFUSED_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "100.64.0.0/10",  # carrier-grade NAT
        "192.0.0.0/24",  # protocol assignments; some clouds' metadata
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # public by number, but inside Azure the host's own service
    )
)
_REFUSED_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them: an IPv4 address in disguise
        "2002::/16",  # 6to4: likewise
        "3fff::/20",  # documentation
    )
)


def is_public(address: Address) -> bool:
    """Whether the address is one of the public Internet, seen through IPv4-in-IPv6 forms."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = _inner_v4(address)
        if inner is None:
            return (
                address in _GLOBAL_UNICAST
                and address.is_global
                and not any(address in network for network in _REFUSED_V6)
            )
        address = inner
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in network for network in _REFUSED_V4)
    )


def _inner_v4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address in _NAT64:
        return ipaddress.IPv4Address(address.packed[-4:])
    return address.ipv4_mapped


def resolve_host(host: str, port: int) -> list[Address]:
    """The addresses of ``host`` by the system's resolver, which also reads 0x7f.1 and 2130706433.

    Raises: OSError when it has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError(f"{host!r} is not a host name") from None
    return [ipaddress.ip_address(address[0]) for *_, address in found]


# --- connections ------------------------------------------------------------------------------

_deadline: ContextVar[float] = ContextVar("deadline")


@contextmanager
def _deadline_in(timeout_s: float) -> Iterator[None]:
    token = _deadline.set(time.monotonic() + timeout_s)
    try:
        yield
    finally:
        _deadline.reset(token)


def _time_left_s() -> float:
    left_s = _deadline.get() - time.monotonic()
    if left_s <= 0:
        raise httpcore.ReadTimeout
    return left_s


class _DeadlineStream(httpcore.NetworkStream):
    """A connection whose every wait ends at the fetch's deadline.

    httpcore's own timeouts start again with each read, so a slow sender would never meet them.
    """

    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _time_left_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _time_left_s())

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        return _DeadlineStream(self._inner.start_tls(ssl_context, server_hostname, _time_left_s()))

    def get_extra_info(self, info: str) -> object:
        return self._inner.get_extra_info(info)


class _CheckedBackend(httpcore.NetworkBackend):
    """Opens connections to checked addresses only; the one place where names are resolved."""

    def __init__(self, resolve: Resolve, private_hosts: frozenset[str]) -> None:
        self._resolve = resolve
        self._private_hosts = private_hosts
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = self._checked(host, port)
        failure: Exception = httpcore.ConnectError("the host has no address")
        for tried, address in enumerate(addresses):
            # A share for each, so that one address that swallows packets leaves time for the next.
            share_s = _time_left_s() / (len(addresses) - tried)
            try:
                return _DeadlineStream(
                    self._sockets.connect_tcp(
                        str(address), port, share_s, local_address, socket_options
                    )
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    def _checked(self, host: str, port: int) -> list[Address]:
        try:
            addresses = self._resolve(host, port)
        except OSError:
            raise ImageDownloadFailed(f"the host name '{host}' could not be resolved") from None
        if _host_key(host) not in self._private_hosts and not all(map(is_public, addresses)):
            raise ImageForbidden(
                f"images may not be fetched from '{host}': it is not on the public Internet; the "
                "operator can allow it in the setting images.allow_private_hosts"
            )
        return addresses


def _host_key(host: str) -> str:
    return host.lower().rstrip(".").strip("[]")


# --- fetching ---------------------------------------------------------------------------------


class ImageFetcher:
    """Fetches images over http(s). One serves all threads of a process; connections are reused."""

    def __init__(self, settings: ImageSettings, resolve: Resolve = resolve_host) -> None:
        self._settings = settings
        self._private_hosts = frozenset(map(_host_key, settings.allow_private_hosts))
        self._backend = _CheckedBackend(resolve, self._private_hosts)
        self._pool: httpcore.ConnectionPool | None = None
        self._pool_lock = threading.Lock()

    def fetch(self, url: str) -> bytes:
        """The body that ``url`` answers, at most ``max_bytes`` long; it may not be an image.

        Raises: ImageForbidden, ImageNotFound, ImageTooLarge or ImageDownloadFailed.
        """
        if not self._settings.allow_http:
            raise ImageForbidden(
                "this server fetches no images (the setting images.allow_http is off); send the "
                "image as a data: URL or upload it to /v1/files"
            )
        timeout_s = self._settings.fetch_timeout_s
        start = self._checked_url(url)
        try:
            with _deadline_in(timeout_s):
                return self._follow(start)
        except httpcore.TimeoutException:
            raise ImageDownloadFailed(
                f"{_shown(start)} did not deliver the image within {timeout_s:g} s"
            ) from None
        except httpcore.NetworkError as error:
            raise ImageDownloadFailed(
                f"{_shown(start)} could not be downloaded: {error or 'the connection broke'}"
            ) from error
        except httpcore.ProtocolError as error:
            # Its text may repeat what the server sent, so it stays out of ours.
            raise ImageDownloadFailed(
                f"{_shown(start)} ended its answer early or did not answer in HTTP"
            ) from error

    def close(self) -> None:
        """Close idle connections. A later fetch opens new ones."""
        with self._pool_lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _follow(self, url: httpx.URL) -> bytes:
        for _ in range(self._settings.max_redirects + 1):
            answer = self._get(url)
            if isinstance(answer, bytes):
                return answer
            url = self._redirected(url, answer)
        raise ImageDownloadFailed(
            f"{_shown(url)} was reached after {self._settings.max_redirects} redirects and more "
            "would follow; give the address of the image itself"
        )

    def _get(self, url: httpx.URL) -> bytes | str:
        """The body, or where the server sends us instead."""
        address = httpcore.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        )
        waits: dict[str, float] = {"pool": _time_left_s()}
        with self._connections().stream(
            "GET", address, headers=_HEADERS, extensions={"timeout": waits}
        ) as response:
            headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in headers:
                return headers[b"location"]
            if response.status in _MISSING:
                raise ImageNotFound(f"{_shown(url)} answered {response.status}: not found")
            if response.status != 200:
                raise ImageDownloadFailed(f"{_shown(url)} answered HTTP status {response.status}")
            if headers.get(b"content-encoding", "identity").strip().lower() != "identity":
                raise ImageDownloadFailed(
                    f"{_shown(url)} answered in a compressed encoding that was not asked for"
                )
            return self._body(response, headers.get(b"content-length", ""), url)

    def _body(self, response: httpcore.Response, declared: str, url: httpx.URL) -> bytes:
        limit = self._settings.max_bytes
        body = bytearray()
        # What it says is a hint only: the bytes are counted as well.
        too_large = _DIGITS.fullmatch(declared) is not None and int(declared) > limit
        if not too_large:
            for piece in response.iter_stream():
                body += piece
                too_large = len(body) > limit
                if too_large:
                    break
        if too_large:
            raise ImageTooLarge(
                f"{_shown(url)} has more than the {limit:,} bytes this server accepts for an image"
            )
        return bytes(body)

    def _redirected(self, url: httpx.URL, location: str) -> httpx.URL:
        try:
            target = str(url.join(location))
        except (httpx.InvalidURL, UnicodeError):
            raise ImageDownloadFailed(f"{_shown(url)} redirects to an invalid URL") from None
        following = self._checked_url(target)
        if url.scheme == "https" and following.scheme == "http":
            raise ImageForbidden(f"{_shown(url)} redirects from https to plain http")
        return following

    def _checked_url(self, text: str) -> httpx.URL:
        try:
            url = httpx.URL(text)
        except (httpx.InvalidURL, UnicodeError):
            url = httpx.URL()
        port = _DEFAULT_PORTS.get(url.scheme, 0) if url.port is None else url.port
        if (
            len(text) > MAX_URL_CHARACTERS
            or not 0 <= port <= MAX_PORT
            or not _HOST.fullmatch(url.host)
        ):
            raise ImageDownloadFailed("the image's URL is not valid")
        if url.scheme not in _DEFAULT_PORTS:
            raise ImageForbidden("an image's URL may only lead to http:// or https://")
        if url.userinfo:
            raise ImageForbidden("an image's URL may not contain a user name or password")
        if port not in (80, 443) and _host_key(url.host) not in self._private_hosts:
            raise ImageForbidden(
                f"images are fetched from ports 80 and 443 only, not {port}; the operator can "
                "allow the host in the setting images.allow_private_hosts"
            )
        return url

    def _connections(self) -> httpcore.ConnectionPool:
        with self._pool_lock:
            if self._pool is None:
                # Made late: loading the certificates takes longer than most batches' image reads.
                self._pool = httpcore.ConnectionPool(
                    ssl_context=httpcore.default_ssl_context(),
                    max_connections=MAX_CONNECTIONS,
                    keepalive_expiry=KEEP_IDLE_S,
                    network_backend=self._backend,
                )
            return self._pool


def _shown(url: httpx.URL) -> str:
    """A URL as messages repeat it: without its query, which may hold a signature."""
    return str(url.copy_with(query=None, fragment=None))[:200]
