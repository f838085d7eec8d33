"""``vlmq models pull``: a checkpoint from a hub, or from a folder that was carried here, linked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import click
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from cli.checkpoint_folder import CheckpointFolder
from cli.checkpoint_source import Source
from cli.commands.models import read_defaults
from cli.hub import Hub
from cli.options import json_option, local_options, read_settings
from cli.output import amount, err, note, print_json
from cli.pull import HubSource, Progress, Silent, is_complete, pull
from shared.checkpoints import own_code, weights_bytes
from shared.errors import InvalidValue
from shared.models import ModelDefaults, ModelRegistry, ModelSource
from shared.settings import Settings
from shared.storage import Layout, storage_errors

_TOKEN = re.compile(r"[\x21-\x7e]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
_LINE_BYTES = 256 << 20


@click.command("pull")
@click.argument("repo_id")
@click.option("--name", help="Link it under this name.  [default: the last part of REPO_ID]")
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
@click.option("--to", type=click.Path(path_type=Path, file_okay=False),
              help="Put it into this folder instead of DATA_DIR/checkpoints.")  # fmt: skip
@click.option("--from", "offline", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Take it from this folder (a checkpoint, or a Hugging Face cache), no network.")  # fmt: skip
@click.option("--endpoint", help="The hub.  [env: HF_ENDPOINT; default: https://huggingface.co]")
@click.option("--token-file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="A file with the hub's token; otherwise HF_TOKEN or the library's own file.")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True,
              help="Allow code inside the checkpoint to run, pickled weights included.")  # fmt: skip
@click.option("--default", "defaults", multiple=True, metavar="NAME=VALUE",
              help="A generation parameter for requests that do not say; repeatable.")  # fmt: skip
@click.option("--engine", help="Serve it with this engine unless the node says otherwise.")
@click.option("--replace", is_flag=True, help="Take the place of a model of the same name.")
@json_option
@local_options
def pull_model(
    repo_id: str,
    name: str | None,
    revision: str | None,
    to: Path | None,
    offline: Path | None,
    endpoint: str | None,
    token_file: Path | None,
    defaults: tuple[str, ...],
    engine: str | None,
    *,
    trust_remote_code: bool,
    replace: bool,
    as_json: bool,
    config: Path | None,
    data_dir: Path | None,
) -> None:
    """Download the checkpoint REPO_ID and link it; a pull that was interrupted goes on."""
    settings = read_settings(config, data_dir)
    if not _REPO.fullmatch(repo_id):
        raise InvalidValue(f"'{repo_id}' is not ORGANISATION/MODEL", param="repo_id")
    wanted = _Wanted(
        repo_id,
        name or repo_id.rpartition("/")[2],
        to.expanduser().absolute() if to else None,
        replace=replace,
        engine=engine,
        trust_remote_code=trust_remote_code,
        defaults=read_defaults(defaults) if defaults else None,
    )
    progress: Progress = Silent() if as_json else _Lines()
    try:
        if offline is not None:
            folder = CheckpointFolder(offline, repo_id, revision)
            described = ModelSource(None, repo_id, folder.listing.revision)
            pulled = _pull(wanted, settings, described, lambda: folder, progress)
        else:
            with closing(Hub(endpoint, _token(token_file))) as hub:
                pulled = _pull_from(hub, wanted, settings, revision or "main", progress)
    except KeyboardInterrupt:
        note("interrupted; the same command goes on from here")
        raise
    if as_json:
        print_json(pulled)
        return
    _tell(pulled)


@dataclass(frozen=True)
class _Wanted:
    """What was asked for: which model, where to, on what terms."""

    repo: str
    name: str
    to: Path | None
    replace: bool
    engine: str | None
    trust_remote_code: bool
    defaults: ModelDefaults | None


@dataclass(frozen=True)
class _Pulled:
    """What there is now. ``fetched`` and ``linked`` say whether this command did that."""

    name: str
    path: str
    source: ModelSource
    weights_bytes: int
    fetched: bool
    linked: bool
    own_code: str | None
    trust_remote_code: bool


def _pull_from(
    hub: Hub, wanted: _Wanted, settings: Settings, revision: str, progress: Progress
) -> _Pulled:
    if _COMMIT.fullmatch(revision):
        described = ModelSource(hub.address, wanted.repo, revision)
        source = None
    else:
        source = HubSource(hub, wanted.repo, revision)
        described = ModelSource(hub.address, wanted.repo, source.listing.revision)
    return _pull(
        wanted,
        settings,
        described,
        lambda: source or HubSource(hub, wanted.repo, revision),
        progress,
    )


def _pull(
    wanted: _Wanted,
    settings: Settings,
    described: ModelSource,
    source: Callable[[], Source],
    progress: Progress,
) -> _Pulled:
    """Have the checkpoint in its folder and linked; whatever is done already is left as it is."""
    layout = Layout(settings.data_dir)
    layout.create()
    registry = ModelRegistry(layout)
    place = layout.checkpoints / quote(wanted.name, safe="") / described.revision
    final = wanted.to or place
    linked = _is_linked(registry, wanted, described, final)
    if not linked:
        # Before, not after, some hours of download.
        registry.require_free(wanted.name, replace=wanted.replace)
    fetched = False
    if not is_complete(final, described):
        with storage_errors(layout.checkpoints):
            layout.checkpoints.mkdir(mode=0o700, exist_ok=True)
        with _shown(progress) as shown:
            fetched = pull(
                source(),
                described,
                final,
                pickles=wanted.trust_remote_code,
                keep_free=settings.storage.min_free_bytes,
                progress=shown,
            )
    if not linked:
        registry.link(
            wanted.name,
            final,
            engine=wanted.engine,
            trust_remote_code=wanted.trust_remote_code,
            defaults=wanted.defaults or ModelDefaults(),
            replace=wanted.replace,
            source=described,
        )
    return _Pulled(
        name=wanted.name,
        path=str(final),
        source=described,
        weights_bytes=weights_bytes(final),
        fetched=fetched,
        linked=not linked,
        own_code=own_code(final),
        trust_remote_code=registry.get(wanted.name).trust_remote_code,
    )


def _is_linked(
    registry: ModelRegistry, wanted: _Wanted, described: ModelSource, final: Path
) -> bool:
    """Whether the model is linked to this very revision, on no other terms than those given."""
    record = next((record for record in registry.list() if record.name == wanted.name), None)
    if record is None or record.source != described or record.path != str(final):
        return False
    return (
        wanted.engine in {None, record.engine}
        and wanted.defaults in (None, record.defaults)
        and wanted.trust_remote_code <= record.trust_remote_code
    )


def _tell(pulled: _Pulled) -> None:
    if not pulled.fetched and not pulled.linked:
        note(f"{pulled.name} is linked to {pulled.path} already; nothing to do")
        return
    note(
        f"linked {pulled.name} to {pulled.path} ({amount(pulled.weights_bytes)} of weights, "
        f"{pulled.source.revision}); running nodes that serve every linked model load it now"
    )
    if pulled.own_code and not pulled.trust_remote_code:
        note(
            f"it carries its own code ({pulled.own_code}), which no engine runs without consent: "
            "read it, then repeat this command with --replace --trust-remote-code"
        )


def _token(file: Path | None) -> str | None:
    """The token in a file, never shown. ``None`` leaves the choice to the hub's library."""
    if file is None:
        return None
    with storage_errors(file):
        token = file.read_text(encoding="utf-8", errors="replace").strip()
    if not _TOKEN.fullmatch(token):
        raise InvalidValue(f"{file} does not hold one token", param="token_file")
    return token


@contextmanager
def _shown(progress: Progress) -> Iterator[Progress]:
    """The same, or a bar where a person watches."""
    if isinstance(progress, Silent) or not err.is_terminal:
        yield progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Bar(*columns, TransferSpeedColumn(), console=err) as bar:
        yield _Bar(bar)


class _Bar:
    """One bar over all files."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("listing", total=None)

    def expect(self, total: int) -> None:
        self._bar.update(self._task, total=total)

    def begin(self, name: str) -> None:
        self._bar.update(self._task, description=escape(name[-40:]))

    def arrived(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def finish(self, name: str, size: int) -> None:
        pass


class _Lines:
    """A line per file, and one now and then within a large one."""

    def __init__(self) -> None:
        self._total = self._done = self._said = 0
        self._name = ""

    def expect(self, total: int) -> None:
        self._total = total

    def begin(self, name: str) -> None:
        self._name = name

    def arrived(self, count: int) -> None:
        self._done += count
        if self._done - self._said >= max(_LINE_BYTES, self._total // 20):
            self._say(self._name)

    def finish(self, name: str, size: int) -> None:
        self._say(f"{name} is complete")

    def _say(self, what: str) -> None:
        self._said = self._done
        note(f"{amount(self._done)} of {amount(self._total)}: {what}")
