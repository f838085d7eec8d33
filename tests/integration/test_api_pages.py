"""The pages for a browser, as files over HTTP; tests/browser uses them."""

from __future__ import annotations

import re
from importlib import resources

import httpx
import pytest

from tests.integration.api_server import ApiServer, StartApi

PARTS = {"pages/chat.css": "text/css", "pages/chat.js": "text/javascript"}


def root(server: ApiServer) -> str:
    """Where the page is."""
    return server.base_url.removesuffix("v1")


def test_the_page_is_there_and_everything_it_names(api: ApiServer) -> None:
    """Each as what it is, for this server only."""
    page = httpx.get(root(api))
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:src|href)="([^"]+)"', page.text)) - {"data:,"}
    assert named == set(PARTS)
    for name, kind in PARTS.items():
        part = httpx.get(f"{root(api)}{name}")
        assert part.status_code == 200
        assert part.headers["content-type"].startswith(kind)
        assert part.headers["content-security-policy"].startswith("default-src 'none';")
        assert part.headers["x-content-type-options"] == "nosniff"


def test_a_page_that_is_still_the_same_is_not_sent_again(api: ApiServer) -> None:
    """304, by its ETag."""
    tag = httpx.get(root(api)).headers["etag"]
    assert httpx.get(root(api), headers={"if-none-match": tag}).status_code == 304
    assert httpx.get(root(api), headers={"if-none-match": '"other"'}).status_code == 200


def test_nothing_in_the_page_runs_or_comes_from_elsewhere() -> None:
    """The policy forbids inline code, so there may be none."""
    for path in (resources.files("api") / "pages").iterdir():
        text = path.read_text()
        assert not re.search(r"<script>|\son[a-z]+=|\sstyle=|https?://", text), path.name
        assert "innerHTML" not in text


@pytest.mark.parametrize("name", ["chat.html", "nothing.js", "..%2fapp.py", "%2e%2e/app.py", ""])
def test_there_is_nothing_else(api: ApiServer, name: str) -> None:
    """404 as everywhere."""
    answer = httpx.get(f"{root(api)}pages/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_where_keys_are_needed_the_page_loads_without_one(start_api: StartApi) -> None:
    """A browser cannot send one before it has the page; all that the page asks for needs one."""
    with start_api(owners=("ann",), host="0.0.0.0") as server:
        assert httpx.get(root(server)).status_code == 200
        for name in PARTS:
            assert httpx.get(f"{root(server)}{name}").status_code == 200
        assert httpx.get(f"{root(server)}pages/nothing.js").status_code == 404
        assert httpx.get(f"{server.base_url}/models").status_code == 401
        assert httpx.post(root(server)).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"x-forwarded-for": "10.0.0.1"}, 401),
    ],
)
def test_where_no_keys_are_needed_only_this_machine_has_the_page(
    api: ApiServer, headers: dict[str, str], status: int
) -> None:
    """As with everything else."""
    assert httpx.get(root(api), headers=headers).status_code == status
