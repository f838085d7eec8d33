"""Fetching images from real servers on this machine, honest ones and others."""

from __future__ import annotations

import contextlib
import gzip
import io
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpcore
import pytest
from PIL import Image

from shared.errors import (
    ImageDownloadFailed,
    ImageError,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    ImageUnreadable,
)
from shared.settings import ImageSettings
from workers.inference.image_fetch import Address, ImageFetcher, is_public, resolve_host
from workers.inference.image_sources import ImageReader

pytestmark = pytest.mark.timeout(40)

Answer = Callable[[BaseHTTPRequestHandler], None]
LOOPBACK = ipaddress.ip_address("127.0.0.1")
PUBLIC = ipaddress.ip_address("8.8.8.8")


def jpeg() -> bytes:
    """A small JPEG file."""
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "teal").save(file, "JPEG")
    return file.getvalue()


class Site:
    """A web server on the loopback interface whose every path does as it is told."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.connections = 0
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                site.connections += 1
                super().setup()

            def do_GET(self) -> None:
                site.requests.append((self.path, dict(self.headers)))
                # A client that hangs up in the middle is what several tests are about.
                with contextlib.suppress(OSError):
                    site.answers[self.path.partition("?")[0]](self)

            def log_message(self, *arguments: object) -> None:
                """Stay quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def url(self, path: str, host: str = "images.test", scheme: str = "http") -> str:
        """The URL of a path here, under a name that only the tests' resolver knows."""
        return f"{scheme}://{host}:{self.port}{path}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def sends(body: bytes, status: int = 200, **headers: str) -> Answer:
    """An honest answer; ``content_type`` and so on become headers."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        named = {"content-length": str(len(body))} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        for name, value in named.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def redirects(to: str, status: int = 302) -> Answer:
    """A redirect."""
    return sends(b"moved", status, location=to)


def raw(*pieces: bytes, every_s: float = 0, endlessly: bool = False) -> Answer:
    """Bytes as they are, then the connection closes; or the last piece again and again."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        for piece in pieces:
            request.wfile.write(piece)
        while endlessly:
            request.wfile.write(pieces[-1])
            time.sleep(every_s)

    return answer


@pytest.fixture
def site() -> Iterator[Site]:
    """A web server with an image at /a.jpg."""
    site = Site()
    site.answers["/a.jpg"] = sends(jpeg(), content_type="image/jpeg")
    yield site
    site.close()


def resolve(host: str, port: int) -> list[Address]:
    """As the system does, but names under ``.test`` are this machine."""
    return [LOOPBACK] if host.endswith(".test") else resolve_host(host, port)


Fetch = Callable[[str], bytes]


@pytest.fixture
def fetcher_with() -> Iterator[Callable[..., ImageFetcher]]:
    """Makes fetchers that may read from images.test, and closes them afterwards."""
    made: list[ImageFetcher] = []

    def make(**settings: object) -> ImageFetcher:
        given = {"allow_private_hosts": ("images.test",), "fetch_timeout_s": 10} | settings
        made.append(ImageFetcher(ImageSettings.model_validate(given), resolve))
        return made[-1]

    yield make
    for fetcher in made:
        fetcher.close()


@pytest.fixture(scope="module")
def fetch() -> Iterator[Fetch]:
    """Fetches with the default settings, images.test allowed; one fetcher for the whole module."""
    settings = ImageSettings(allow_private_hosts=("images.test",), fetch_timeout_s=10)
    fetcher = ImageFetcher(settings, resolve)
    yield fetcher.fetch
    fetcher.close()


# --- what works -------------------------------------------------------------------------------


def test_an_image_is_fetched_and_verified(site: Site) -> None:
    """From the URL in a request to the engine's image."""
    settings = ImageSettings(allow_private_hosts=("IMAGES.test.",))
    fetcher = ImageFetcher(settings, resolve)
    reader = ImageReader(settings, lambda _: Path("/nowhere"), fetcher)
    site.answers["/page"] = sends(b"<!doctype html><html></html>", content_type="image/jpeg")
    try:
        image = reader.read(site.url("/a.jpg?size=1#part"), "high")
        assert (image.data, image.width, image.height) == (jpeg(), 30, 20)
        with pytest.raises(ImageUnreadable, match="HTML"):
            reader.read(site.url("/page"))
    finally:
        reader.close()


def test_the_request_tells_the_name_and_asks_for_no_compression(site: Site, fetch: Fetch) -> None:
    """The connection goes to an address, the Host header still has the name."""
    fetch(site.url("/a.jpg?size=1#part"))
    path, headers = site.requests[0]
    assert path == "/a.jpg?size=1"
    assert headers["Host"] == f"images.test:{site.port}"
    assert headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(site: Site, fetch: Fetch, status: int) -> None:
    """Absolute and relative ones, up to the limit of three."""
    site.answers["/1"] = redirects(site.url("/2"), status)
    site.answers["/2"] = redirects("3", status)
    site.answers["/3"] = redirects(f"//images.test:{site.port}/a.jpg", status)
    assert fetch(site.url("/1")) == jpeg()


def test_answers_without_a_length_are_read_to_their_end(site: Site, fetch: Fetch) -> None:
    """Chunked, and ended by closing."""
    site.answers["/closed"] = raw(b"HTTP/1.0 200 OK\r\n\r\n", jpeg())
    size = f"{len(jpeg()):x}".encode()
    site.answers["/chunked"] = raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        size + b"\r\n" + jpeg() + b"\r\n0\r\n\r\n",
    )
    assert fetch(site.url("/closed")) == jpeg()
    assert fetch(site.url("/chunked")) == jpeg()


def test_threads_share_connections(site: Site, fetch: Fetch) -> None:
    """Many images from one server need few connections, and every thread gets its own bytes."""
    for number in range(40):
        site.answers[f"/{number}"] = sends(b"%d" % number)
    wrong: list[int] = []

    def work(numbers: Iterable[int]) -> None:
        wrong.extend(n for n in numbers if fetch(site.url(f"/{n}")) != b"%d" % n)

    threads = [threading.Thread(target=work, args=(range(i, 40, 4),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(site.requests) == 40
    assert site.connections < 20


def test_proxies_of_the_environment_are_ignored(
    site: Site, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would connect to addresses that nobody checked."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(site.url("/a.jpg")) == jpeg()


# --- where it may not go ----------------------------------------------------------------------

PRIVATE_URLS = [
    "http://127.0.0.1/",
    "http://localhost/",
    "http://2130706433/",
    "http://0x7f.1/",
    "http://127.1/",
    "http://0/",
    "http://0.0.0.0/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://168.63.129.16/",
    "http://192.0.0.192/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b:1::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://[2001:0:7f00:1::]/",
    "http://[fe80::1]/",
    "http://[fd00:ec2::254]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "https://127.0.0.1/",
    "http://intranet.test/",
]


@pytest.mark.parametrize("url", PRIVATE_URLS)
def test_private_addresses_are_forbidden_however_they_are_written(url: str, fetch: Fetch) -> None:
    """Names, decimal, octal, hexadecimal, short and IPv6 forms."""
    with pytest.raises(ImageForbidden, match="public"):
        fetch(url)


@pytest.mark.parametrize("url", PRIVATE_URLS)
def test_redirects_to_private_addresses_are_forbidden(url: str, site: Site, fetch: Fetch) -> None:
    """A public server must not be able to send us into the private network."""
    site.answers["/go"] = redirects(url)
    with pytest.raises(ImageForbidden):
        fetch(site.url("/go"))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_public_addresses_are_public(address: str) -> None:
    """NAT64 and mapped forms are judged by the IPv4 address inside them."""
    assert is_public(ipaddress.ip_address(address))


class Recorder(httpcore.NetworkBackend):
    """Writes down where a connection would go, and makes none."""

    def __init__(self) -> None:
        self.hosts: list[str] = []

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        self.hosts.append(host)
        raise httpcore.ConnectError("recorded")


def test_a_name_that_changes_its_address_gains_nothing() -> None:
    """The address that was checked is the one connected to; the name is asked once."""
    answers = [[PUBLIC], [LOOPBACK]]
    recorder = Recorder()
    fetcher = ImageFetcher(ImageSettings(), lambda host, port: answers.pop(0))
    fetcher._backend._sockets = recorder  # type: ignore[assignment]
    with pytest.raises(ImageDownloadFailed):
        fetcher.fetch("http://rebind.example/a.jpg")
    assert recorder.hosts == ["8.8.8.8"]
    with pytest.raises(ImageForbidden):
        fetcher.fetch("http://rebind.example/a.jpg")
    assert recorder.hosts == ["8.8.8.8"]
    assert answers == []


def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    """Otherwise a failed first connection would lead on to the private one."""
    recorder = Recorder()
    fetcher = ImageFetcher(ImageSettings(), lambda host, port: [PUBLIC, LOOPBACK])
    fetcher._backend._sockets = recorder  # type: ignore[assignment]
    with pytest.raises(ImageForbidden):
        fetcher.fetch("https://mixed.example/a.jpg")
    assert recorder.hosts == []


def test_all_addresses_are_tried() -> None:
    """The first may be down."""
    recorder = Recorder()
    second = ipaddress.ip_address("2606:4700::1111")
    fetcher = ImageFetcher(ImageSettings(), lambda host, port: [PUBLIC, second])
    fetcher._backend._sockets = recorder  # type: ignore[assignment]
    with pytest.raises(ImageDownloadFailed):
        fetcher.fetch("http://both.example/a.jpg")
    assert recorder.hosts == ["8.8.8.8", "2606:4700::1111"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://user:secret@images.test/a.jpg", "password"),
        ("http://example.com:6379/a.jpg", "ports"),
        ("https://example.com:22/a.jpg", "ports"),
    ],
)
def test_urls_that_ask_for_more_than_an_image_are_forbidden(
    url: str, reason: str, fetch: Fetch
) -> None:
    """Refused before any name is resolved; a password is not repeated."""
    with pytest.raises(ImageForbidden, match=reason) as caught:
        fetch(url)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://images.test/a", "gopher://x/", "data:image/png;base64,"]
)
def test_redirects_to_other_schemes_are_refused(target: str, site: Site, fetch: Fetch) -> None:
    """Only http and https lead on."""
    site.answers["/go"] = redirects(target)
    with pytest.raises((ImageForbidden, ImageDownloadFailed)):
        fetch(site.url("/go"))


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///a.jpg",
        "http://[::1",
        "http://a:b/",
        "http://images.test:99999/",
        "http://images.test:-1/",
        "http://.images.test/",
        "http://ima%67es.test/",
        "http://images.test/\ud800",
        "http://images.test/" + "x" * 10_000,
        "http://" + "a" * 300 + "/",
        "http://0177.0.0.1/",
        "http://localhost./",
        "http://no-such-name.invalid/",
    ],
)
def test_urls_that_lead_nowhere_fail(url: str, fetch: Fetch) -> None:
    """Whatever is wrong with them, it is an image error and short."""
    with pytest.raises(ImageError) as caught:
        fetch(url)
    assert len(caught.value.message) < 600


def test_fetching_can_be_switched_off(
    site: Site, fetcher_with: Callable[..., ImageFetcher]
) -> None:
    """Then nothing is asked of anyone, and the message names the setting."""
    with pytest.raises(ImageForbidden, match="allow_http"):
        fetcher_with(allow_http=False).fetch(site.url("/a.jpg"))
    assert site.requests == []


# --- servers that misbehave -------------------------------------------------------------------


def test_endless_redirects_end(site: Site, fetch: Fetch) -> None:
    """After the first request and three redirects."""
    site.answers["/loop"] = redirects("/loop")
    with pytest.raises(ImageDownloadFailed, match="redirects"):
        fetch(site.url("/loop"))
    assert len(site.requests) == 4


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (404, ImageNotFound),
        (410, ImageNotFound),
        (401, ImageDownloadFailed),
        (500, ImageDownloadFailed),
        (204, ImageDownloadFailed),
        (304, ImageDownloadFailed),
        (302, ImageDownloadFailed),
    ],
)
def test_a_status_other_than_ok_is_an_error(
    site: Site, fetch: Fetch, status: int, error: type[ImageError]
) -> None:
    """The message names the status and leaves out the query, which may hold a signature."""
    site.answers["/x"] = sends(b"", status)
    with pytest.raises(error, match=str(status)) as caught:
        fetch(site.url("/x?signature=hush"))
    assert "hush" not in caught.value.message


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    {
        "says so": raw(OK + b"Content-Length: 100000000\r\n\r\n"),
        "says so absurdly": raw(OK + b"Content-Length: 99999999999999999999\r\n\r\n"),
        "without length": raw(b"HTTP/1.0 200 OK\r\n\r\n", bytes(9000), endlessly=True),
        "chunked": raw(
            OK + b"Transfer-Encoding: chunked\r\n\r\n",
            b"1000\r\n" + bytes(4096) + b"\r\n",
            endlessly=True,
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_too_large_a_body_is_not_read_to_its_end(
    site: Site, fetcher_with: Callable[..., ImageFetcher], answer: tuple[str, Answer]
) -> None:
    """Whatever it says of its length; two of these would never end."""
    site.answers["/large"] = answer[1]
    with pytest.raises(ImageTooLarge):
        fetcher_with(max_bytes=8192).fetch(site.url("/large"))


def test_a_body_of_exactly_the_limit_passes(
    site: Site, fetcher_with: Callable[..., ImageFetcher]
) -> None:
    """The limit itself is allowed."""
    assert fetcher_with(max_bytes=len(jpeg())).fetch(site.url("/a.jpg")) == jpeg()


@pytest.mark.parametrize(
    "answer",
    {
        "promises more": raw(OK + b"Content-Length: 5000\r\n\r\n" + bytes(100)),
        "breaks a chunk off": raw(OK + b"Transfer-Encoding: chunked\r\n\r\n1000\r\nabc"),
        "negative length": raw(OK + b"Content-Length: -5\r\n\r\nabc"),
        "two lengths": raw(OK + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabcde"),
        "no HTTP": raw(b"220 mail.test ESMTP\r\n"),
        "nothing": raw(b""),
        "endless header": raw(OK, b"X-More: " + b"x" * 1000 + b"\r\n", endlessly=True),
        "compressed": sends(gzip.compress(jpeg()), content_encoding="gzip"),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_broken_answer_is_a_failed_download(
    site: Site, fetch: Fetch, answer: tuple[str, Answer]
) -> None:
    """Never half an image, never an inflated one."""
    site.answers["/broken"] = answer[1]
    with pytest.raises(ImageDownloadFailed):
        fetch(site.url("/broken"))


@pytest.mark.parametrize(
    "answer",
    {
        "body": raw(OK + b"Content-Length: 5000\r\n\r\n", b"x", every_s=0.1, endlessly=True),
        "header": raw(OK + b"X-Slow: ", b"x", every_s=0.1, endlessly=True),
        "silence": raw(b"", every_s=0.1, endlessly=True),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_server_that_drips_is_given_up_at_the_deadline(
    site: Site, fetcher_with: Callable[..., ImageFetcher], answer: tuple[str, Answer]
) -> None:
    """Each byte comes in time, the whole never does: without a deadline this test would hang."""
    ended = threading.Event()

    def watched(request: BaseHTTPRequestHandler) -> None:
        try:
            answer[1](request)
        finally:
            ended.set()

    site.answers["/slow"] = watched if answer[0] != "silence" else lambda _: time.sleep(2)
    with pytest.raises(ImageDownloadFailed, match=r"within 0\.6 s"):
        fetcher_with(fetch_timeout_s=0.6).fetch(site.url("/slow"))
    if answer[0] != "silence":
        assert ended.wait(10), "the connection was left open"


def test_slow_redirects_share_one_deadline(
    site: Site, fetcher_with: Callable[..., ImageFetcher]
) -> None:
    """Ten redirects of 0.3 s each do not add up to three seconds."""

    def slow(request: BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        redirects("/again")(request)

    site.answers["/again"] = slow
    with pytest.raises(ImageDownloadFailed, match="within"):
        fetcher_with(fetch_timeout_s=1, max_redirects=10).fetch(site.url("/again"))
    assert len(site.requests) < 6


def test_a_port_where_nobody_listens_fails(fetch: Fetch) -> None:
    """Refused connections are an error of the image, not of the worker."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ImageDownloadFailed):
            fetch(f"http://images.test:{taken.getsockname()[1]}/a.jpg")


def test_one_bad_answer_leaves_the_next_fetch_alone(site: Site, fetch: Fetch) -> None:
    """Connections in an unknown state are not used again."""
    site.answers["/broken"] = raw(OK + b"Content-Length: 5000\r\n\r\n" + bytes(100))
    for _ in range(3):
        with pytest.raises(ImageDownloadFailed):
            fetch(site.url("/broken"))
        assert fetch(site.url("/a.jpg")) == jpeg()


# --- TLS --------------------------------------------------------------------------------------


@pytest.fixture
def secure_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An https server with a certificate for images.test that this process trusts."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl program is not installed")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=images.test"),
            *("-addext", "subjectAltName=DNS:images.test"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    site = Site(context)
    site.answers["/a.jpg"] = sends(jpeg())
    yield site
    site.close()


def test_https_checks_the_certificate_against_the_name(
    secure_site: Site, fetcher_with: Callable[..., ImageFetcher]
) -> None:
    """The connection goes to an address, the certificate is still that of the name."""
    fetcher = fetcher_with(allow_private_hosts=("images.test", "other.test"))
    assert fetcher.fetch(secure_site.url("/a.jpg", scheme="https")) == jpeg()
    with pytest.raises(ImageDownloadFailed, match="certificate"):
        fetcher.fetch(secure_site.url("/a.jpg", "other.test", "https"))


def test_a_redirect_from_https_to_http_is_refused(
    secure_site: Site, site: Site, fetcher_with: Callable[..., ImageFetcher]
) -> None:
    """What was asked for in secret is not fetched in the open."""
    secure_site.answers["/down"] = redirects(site.url("/a.jpg"))
    with pytest.raises(ImageForbidden, match="plain http"):
        fetcher_with().fetch(secure_site.url("/down", scheme="https"))
    assert site.requests == []


def test_a_silent_tls_handshake_meets_the_deadline(
    fetcher_with: Callable[..., ImageFetcher],
) -> None:
    """A port that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://images.test:{listener.getsockname()[1]}/a.jpg"
        with pytest.raises(ImageDownloadFailed, match="within"):
            fetcher_with(fetch_timeout_s=0.5).fetch(url)
