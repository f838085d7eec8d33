"""A hub of models, spoken to with ``huggingface_hub``: which files a revision has, and their bytes.

The library resolves names, finds the token and lists files. The bytes are fetched here, because a
file of many gigabytes must go on where it stopped, also after ``kill -9``: recent versions of the
library throw a partial file away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import httpx

from cli.checkpoint_source import Listing, SourceFile, checked_files
from shared.errors import (
    CheckpointInvalid,
    ConfigurationError,
    HubRefused,
    HubUnavailable,
    InvalidValue,
    VlmqError,
)
from shared.storage import storage_errors, write_all

ATTEMPTS = 5
"""How often in a row a file may fail without a further byte before it is given up."""
TIMEOUT_S = 30.0
"""How long the hub may be silent."""

_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class Hub:
    """One hub, as one user. ``address`` is where it is; the token is sent there and never shown."""

    def __init__(
        self, endpoint: str | None = None, token: str | None = None, *, pause_s: float = 1.0
    ) -> None:
        self._library = _import_library()
        self.address: str = (endpoint or self._library.constants.ENDPOINT).rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise InvalidValue(
                f"the hub's address starts with http:// or https://, not '{self.address}'",
                param="endpoint",
            )
        self._token = token
        self._pause_s = pause_s
        self._client = httpx.Client(
            headers=self._library.utils.build_hf_headers(
                token=token, library_name="vlmq", library_version=version("vlmq")
            ),
            follow_redirects=True,
            timeout=TIMEOUT_S,
        )

    def close(self) -> None:
        """Let the connections go."""
        self._client.close()

    def list(self, repo: str, revision: str) -> Listing:
        """The files of a revision (branch, tag or commit) and the commit it names.

        Raises: HubRefused, HubUnavailable, InvalidValue, CheckpointInvalid for a listing that
        cannot be trusted.
        """
        errors = self._library.errors
        # requests' errors are OSErrors; those of the library's newer transport have this base.
        transport = errors.HfHubHTTPError.__bases__[0]
        try:
            api = self._library.HfApi(endpoint=self.address, token=self._token)
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
        except errors.HFValidationError as error:
            raise InvalidValue(f"'{repo}' is not a repository: {error}", param="repo_id") from None
        except errors.OfflineModeIsEnabled:
            raise HubUnavailable(
                "HF_HUB_OFFLINE forbids going to the hub; unset it, or take the files from a "
                "folder with --from"
            ) from None
        except errors.RevisionNotFoundError:
            raise HubRefused(
                f"{repo} has no revision '{revision}' at {self.address}; without --revision its "
                "branch main is taken"
            ) from None
        except errors.HfHubHTTPError as error:
            gated = isinstance(error, errors.GatedRepoError)
            raise self._refusal(repo, error.response.status_code, gated=gated) from None
        except (OSError, transport) as error:
            raise HubUnavailable(self._silent(_reason(error))) from None
        files = [
            SourceFile(
                name=sibling.rfilename,
                size=-1 if sibling.size is None else sibling.size,
                sha256=sibling.lfs.sha256 if sibling.lfs else None,
                git_sha1=None if sibling.lfs else sibling.blob_id,
            )
            for sibling in info.siblings or ()
        ]
        return checked_files(repo, info.sha, files)

    def fetch(
        self,
        repo: str,
        revision: str,
        file: SourceFile,
        part: Path,
        arrived: Callable[[int], None],
    ) -> None:
        """Complete ``part``, which may hold the beginning of ``file`` already.

        ``arrived`` is told of bytes as they are written, and of bytes taken back by a negative
        number. Raises: HubUnavailable (what arrived is kept), HubRefused, CheckpointInvalid,
        StorageFull, StorageFailed.
        """
        url = self._library.hf_hub_url(repo, file.name, revision=revision, endpoint=self.address)
        failures = 0
        while True:
            before = _size(part)
            try:
                self._go_on(url, repo, file, part, arrived)
                return
            except _Cut as cut:
                failures = 0 if _size(part) > before else failures + 1
                if failures >= ATTEMPTS:
                    raise HubUnavailable(self._silent(str(cut))) from None
                time.sleep(self._pause_s * 2**failures)

    def _go_on(
        self, url: str, repo: str, file: SourceFile, part: Path, arrived: Callable[[int], None]
    ) -> None:
        """One request for what is missing. Raises: _Cut if it ended early."""
        have = _size(part)
        if have == file.size and part.exists():
            return
        headers = {"accept-encoding": "identity"}
        if have:
            headers["range"] = f"bytes={have}-"
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                status = response.status_code
                if status in _AGAIN:
                    raise _Cut(f"it answered {status} for {file.name}")
                goes_on = status == httpx.codes.PARTIAL_CONTENT and response.headers.get(
                    "content-range", ""
                ).startswith(f"bytes {have}-")
                if have and not goes_on:
                    # Refused (416) or ignored: begin again rather than put pieces together wrongly.
                    arrived(-have)
                    with storage_errors(part):
                        part.unlink()
                    have = 0
                if status == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise _Cut(f"it would not go on with {file.name}")
                if status != httpx.codes.OK and not goes_on:
                    raise self._refusal(repo, status, name=file.name)
                self._write(response, file, part, have, arrived)
        except (httpx.TransportError, httpx.DecodingError, httpx.TooManyRedirects) as error:
            raise _Cut(_reason(error)) from None

    def _write(
        self,
        response: httpx.Response,
        file: SourceFile,
        part: Path,
        have: int,
        arrived: Callable[[int], None],
    ) -> None:
        with storage_errors(part):
            stream = open(part, "ab", buffering=0)  # noqa: SIM115 - closed right below
        with stream:
            # As it comes: blocks of a size of ours would be lost half full when it is cut.
            for block in response.iter_raw():
                have += len(block)
                if have > file.size:
                    raise CheckpointInvalid(
                        f"{file.name} is longer than the {file.size} bytes that {self.address} "
                        "lists; the hub or a proxy on the way is at fault"
                    )
                with storage_errors(part):
                    write_all(stream, block)
                arrived(len(block))
        if have < file.size:
            raise _Cut(f"{file.name} ended after {have} of {file.size} bytes")

    def _refusal(
        self, repo: str, status: int, *, gated: bool = False, name: str | None = None
    ) -> VlmqError:
        what = f"{name} of {repo}" if name else repo
        if status in _AGAIN:
            return HubUnavailable(self._silent(f"it answered {status}"))
        if status == httpx.codes.FORBIDDEN or gated:
            return HubRefused(
                f"{self.address} does not let you have {what} ({status}): ask for access on the "
                "model's page there, then set HF_TOKEN to a token of that account (or --token-file)"
            )
        if status == httpx.codes.UNAUTHORIZED:
            return HubRefused(
                f"{self.address} has no {what}, or only for those it knows ({status}): check the "
                "name; for a private model set HF_TOKEN (or --token-file), and if it is set, "
                "check that the token is still valid"
            )
        if status == httpx.codes.NOT_FOUND:
            return HubRefused(
                f"{self.address} has no {what} ({status}); check its name, and that the model is "
                "not private to an account whose token HF_TOKEN does not hold"
            )
        return HubRefused(f"{self.address} answered {status} for {what}; try again later")

    def _silent(self, reason: str) -> str:
        return (
            f"the hub {self.address} cannot be reached or stopped answering ({reason}); what has "
            "arrived is kept and the same command goes on from there; check the network or "
            "HTTPS_PROXY, or take the files from a folder with --from"
        )


class _Cut(Exception):
    """The answer ended early; asking again may give the rest."""


def _import_library() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise ConfigurationError(
            f"'vlmq models pull' needs the package huggingface_hub ({error}): pip install "
            "'vlmq[hub]', or copy the files here and use --from or 'vlmq models link'"
        ) from error
    return huggingface_hub


def _reason(error: BaseException) -> str:
    """The kind of a network failure. Not its text, which may hold a signed address."""
    return type(error).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
