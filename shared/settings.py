"""Every setting of every program, in one frozen tree.

Built once per process by :func:`load_settings` and passed on; nothing else reads the environment
or a configuration file. Order: environment (``VLMQ_API__PORT=9000``) over the TOML file over the
defaults here. An unknown key is an error that names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from shared.errors import ConfigurationError

MIB = 1024 * 1024
_ENV_PREFIX = "VLMQ_"
_SECTIONS = frozenset({"storage", "redis", "api", "queue", "images", "node", "finetune"})
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StorageSettings(_Section):
    """Where data lives. ``data_dir`` is shared by all nodes, ``run_dir`` is local to one."""

    data_dir: Path = Path.home() / ".local" / "share" / "vlmq"
    run_dir: Path | None = None
    min_free_bytes: Annotated[int, Field(ge=0)] = 256 * MIB
    """New uploads and batches are refused when the disk has less room than this."""
    keep_files_days: float | None = None
    """Uploaded files are deleted after this many days, unless a live batch needs them."""
    keep_batches_days: float | None = None
    """Finished batches and their output files are deleted after this many days."""
    keep_caption_sets_days: float | None = None
    """What is known of a synced image set is deleted when it was not synced for this many days."""
    keep_finetunes_days: float | None = None
    """Fine-tunes that ended are deleted after this many days, with checkpoints and result files,
    but not one that a registered model came of."""


class RedisSettings(_Section):
    """Which Redis. Without ``url`` an embedded Valkey is started by ``vlmq up``."""

    url: str | None = None
    password_file: Path | None = None
    """The file that holds the password of ``url``; read again for every connection."""
    server: str | None = None
    """The server program for the embedded Redis; found by itself when not set."""

    @model_validator(mode="after")
    def _one_password(self) -> RedisSettings:
        if self.password_file is None:
            return self
        if self.url is None:
            raise ValueError(
                "password_file needs url: the embedded Valkey has no password, only a socket "
                "that nobody else can open"
            )
        if urlsplit(self.url).password is not None:
            raise ValueError("give the password in url or in password_file, not in both")
        return self


class ApiSettings(_Section):
    """The HTTP front end."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    processes: Count = 1
    threads: Count = 320
    """Each open stream holds one thread."""
    max_body_bytes: Count = 64 * MIB
    """The largest JSON body, images in ``data:`` URLs included."""
    max_upload_bytes: Count = 64 * 1024 * MIB
    request_timeout_s: Seconds = 600
    max_waiting_chats: Count = 2048
    """Chat requests that may wait or run at once; more get 429."""
    metrics_readers: Literal["metrics", "owners", "anyone"] = "metrics"
    """Who may read ``/metrics`` once there are API keys: the owner of that name, every key's owner,
    or whoever reaches the server. Without keys it is this machine, as for everything."""


class QueueSettings(_Section):
    """Leases, tickets and chunks. The defaults were measured; see docs/benchmarks.md."""

    lease_ttl_s: Seconds = 20
    renew_s: Seconds = 5
    reap_s: Seconds = 2
    chunk_items: Annotated[int, Field(ge=1, le=65536)] = 256
    min_chunk_items: Annotated[int, Field(ge=1, le=65536)] = 16
    spread_chunks: Count = 64
    """A batch is cut into about so many chunks, within the two bounds, so that a small one keeps
    all workers busy, too."""
    chunk_bytes: Count = 8 * MIB
    """A chunk is closed early when its lines reach this size."""
    max_line_bytes: Count = 64 * MIB
    ticket_window: Count = 16
    """Most tickets that wait in Redis for one model."""
    slice_s: Seconds = 2
    """How long one ticket may go on claiming chunks before others have a turn."""
    max_chunk_attempts: Annotated[int, Field(ge=2)] = 12
    drain_s: Seconds = 25
    """How long a stopping consumer goes on with the chunk or chats in hand."""

    @model_validator(mode="after")
    def _renewed_before_expiry(self) -> QueueSettings:
        if self.renew_s * 2 > self.lease_ttl_s:
            raise ValueError("renew_s must be at most half of lease_ttl_s")
        return self


class ImageSettings(_Section):
    """Which images are accepted, and from where."""

    roots: tuple[Path, ...] = ()
    max_pixels: Count = 100_000_000
    max_bytes: Count = 50 * MIB
    max_per_request: Count = 16
    max_request_bytes: Count = 64 * MIB
    """All images of one request together, encoded."""
    allow_http: bool = True
    allow_private_hosts: tuple[str, ...] = ()
    """Hosts on private networks that images may be fetched from, such as an image server's."""
    fetch_timeout_s: Seconds = 15
    scaling: Literal["fast", "exact", "engine"] = "fast"
    """How images become a model's tiles: JPEGs decoded at reduced size, every pixel decoded as in
    the model's published preprocessing, or left to the engine."""
    max_redirects: Annotated[int, Field(ge=0)] = 3


class FinetuneSettings(_Section):
    """Fine-tunes: on which GPUs of this machine, with which interpreter, within which bounds."""

    gpus: tuple[str, ...] = ()
    """GPUs that fine-tunes may take; engines on them leave meanwhile. Empty: the processor."""
    max_jobs: Count = 1
    """How many fine-tunes run on this machine at once."""
    python: str | None = None
    """The interpreter that has ``vlmq[training]``; none: this one."""
    max_attempts: Count = 4
    """How often in a row training may die without a new checkpoint before the job fails."""
    stop_s: Seconds = 60
    """How long a trainer that is asked to stop may take for its last checkpoint."""
    lend_wait_s: Seconds = 900
    """How long engines may take to finish before a fine-tune takes their GPU."""
    compare_wait_s: Seconds = 1800
    """How long a tuned model may take to be loaded and to answer the held-out rows."""
    max_rows: Count = 2_000_000
    config_owners: tuple[str, ...] = ()
    """Owners who may send a configuration of their own, which is code that runs here."""


class ServeSettings(_Section):
    """One model that this node serves."""

    model: str
    engine: str = "transformers"
    replicas: Count | Literal["auto"] = 1
    """``auto``: what the engine, its GPUs' memory and the cores allow; see ``workers.placement``."""
    gpus: tuple[str, ...] = ()
    """Replica N gets ``gpus[N % len(gpus)]`` as CUDA_VISIBLE_DEVICES; "0,1" gives it both."""
    memory_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """How much of each of its GPUs' memory all its replicas there take together; none: all."""
    load: Literal["always", "on_demand"] = "always"
    """``on_demand``: not loaded before somebody asks for it, unless everything fits."""
    session_len: Count = 8192
    max_running: Count | None = None
    """Requests that one replica works on at once; none: what suits its engine."""
    options: dict[str, Any] = {}

    @property
    def gpu_share(self) -> float:
        """The part of each of its GPUs that the entry may fill."""
        return 1.0 if self.memory_share is None else self.memory_share

    @model_validator(mode="after")
    def _shares_some_gpu(self) -> ServeSettings:
        if self.memory_share is not None and not self.gpus:
            raise ValueError("memory_share needs gpus, whose memory it shares")
        return self


class NodeSettings(_Section):
    """What runs on this machine."""

    name: str = Field(default_factory=socket.gethostname)
    run_id: str = ""
    """Set by the node for its children, so that its reaper may judge which of them are dead."""
    roles: tuple[Literal["api", "redis", "chat", "batch", "engines", "reaper", "finetune"], ...] = (
        "api",
        "redis",
        "chat",
        "batch",
        "engines",
        "reaper",
        "finetune",
    )
    serve: tuple[ServeSettings, ...] = ()
    """Without any, a node serves every linked model, each with the engine it was linked with."""
    batch_processes: Count | Literal["auto"] = "auto"
    """They read, verify and cut images; ``auto``: most cores beside GPUs, else two."""
    mps: bool = False
    """Run NVIDIA's Multi-Process Service, so that replicas on one GPU compute at the same time."""
    chat_threads: Count = 256
    """Each chat in progress holds one thread."""
    engine_restart_s: Seconds = 1
    engine_wait_s: Seconds = 30
    """How long a request waits for an engine that is starting or restarting."""
    model_wait_s: Seconds = 120
    """How long a chat request waits for a model that is loaded for it."""
    max_model_wait_s: Seconds = 60
    """A model wanted for longer than this gets its turn even if all others are busy."""
    min_resident_s: Seconds = 30
    """How long a model that was loaded on demand may work before it has to make room."""
    warm_up_limit_s: Seconds = 300
    """How long a loaded engine may take for its first answers."""
    load_limit_s: Seconds = 1800
    """An engine process that has not loaded its model by then hangs, and is killed and restarted."""
    engine_silence_s: Seconds = 60
    """An engine process that says nothing for so long hangs, and is killed and started again."""
    batch_nice: Annotated[int, Field(ge=0, le=19)] = 10
    """Batch consumers yield the processor to chat by this niceness."""


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        env_prefix=_ENV_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    storage: StorageSettings = StorageSettings()
    redis: RedisSettings = RedisSettings()
    api: ApiSettings = ApiSettings()
    queue: QueueSettings = QueueSettings()
    images: ImageSettings = ImageSettings()
    node: NodeSettings = Field(default_factory=NodeSettings)
    finetune: FinetuneSettings = FinetuneSettings()
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file (which arrives as the constructor's arguments)."""
        return (env_settings, init_settings)

    @property
    def data_dir(self) -> Path:
        """The shared folder of records, files and shards."""
        return self.storage.data_dir.expanduser().absolute()

    @property
    def run_dir(self) -> Path:
        """This machine's sockets and pid files; short, for Unix sockets allow about 100 bytes."""
        if self.storage.run_dir is not None:
            return self.storage.run_dir.expanduser().absolute()
        digest = hashlib.sha256(str(self.data_dir).encode()).hexdigest()[:10]
        return Path(tempfile.gettempdir()) / f"vlmq-{os.getuid()}-{digest}"

    @property
    def redis_url(self) -> str:
        """Where Redis answers: the configured one or the embedded one's socket."""
        return self.redis.url or f"unix://{self.run_dir / 'redis.sock'}"


class _Snapshot(Settings):
    """A tree resolved earlier: taken as it is, the environment is not looked at again."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what was written down."""
        return (init_settings,)


def load_settings(config: Path | None = None, **overrides: Any) -> Settings:
    """Read the file ``config`` (if any), the environment and ``overrides`` (sections by name).

    A ``.toml`` file is what people write. A ``.json`` file is a :func:`snapshot` that a node made
    for its programs; it is complete, so the environment does not change it.

    Raises: ConfigurationError naming the file and each bad key.
    """
    if config is None or config.suffix != ".json":
        _require_known_sections(os.environ)
    if config is None:
        return _build(Settings, _merged({}, overrides), "the environment")
    if config.suffix == ".json":
        return _build(_Snapshot, _merged(_read(config, json.loads), overrides), str(config))
    return _build(Settings, _merged(_read(config, tomllib.loads), overrides), str(config))


def with_overrides(settings: Settings, **overrides: Any) -> Settings:
    """The same tree with some fields replaced (sections by name), stronger than the environment.

    Raises: ConfigurationError naming each bad key.
    """
    return _build(_Snapshot, _merged(snapshot(settings), overrides), "the command line")


def snapshot(settings: Settings) -> dict[str, Any]:
    """The whole tree as JSON values, folders absolute. May hold secrets: write it with mode 600."""
    values = settings.model_dump(mode="json")
    values["storage"]["data_dir"] = str(settings.data_dir)
    values["storage"]["run_dir"] = str(settings.run_dir)
    return values


def _read(config: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    kind = config.suffix.lstrip(".").upper()
    try:
        values = parse(config.read_text())
    except OSError as error:
        raise ConfigurationError(f"cannot read {config}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigurationError(f"{config} is not valid {kind}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{config} does not hold a table of settings")
    return values


def _merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    sections = {
        section: {**values.get(section, {}), **fields} if isinstance(fields, dict) else fields
        for section, fields in overrides.items()
    }
    return {**values, **sections}


def _require_known_sections(names: Iterable[str]) -> None:
    """Name a misspelt section of the environment, which would otherwise change nothing."""
    for name in names:
        section, separator, _ = name.removeprefix(_ENV_PREFIX).partition("__")
        if name.startswith(_ENV_PREFIX) and separator and section.lower() not in _SECTIONS:
            raise ConfigurationError(
                f"the environment sets {name}, but there is no section '{section.lower()}'; "
                f"the sections are {', '.join(sorted(_SECTIONS))}"
            )


def _build(kind: type[Settings], values: dict[str, Any], where: str) -> Settings:
    try:
        return kind(**values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors()
        ]
        raise ConfigurationError(
            f"the configuration from {where} is not valid:\n" + "\n".join(lines)
        ) from None
