"""One machine's part of vlmq: starts its programs in order, watches them, stops them in order.

    python -m workers.node --config node.toml

The node computes nothing itself. Every program it starts dies with it, even by kill -9; what might
be left all the same is ended when the next node with the same ``run_dir`` starts.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from shared.clock import unix_now
from shared.connection import connect, server_of
from shared.errors import ConfigurationError, QueueUnavailable, StorageFailed, VlmqError
from shared.ids import new_id
from shared.keys import KeyStore
from shared.log import configure, get_logger
from shared.models import ModelRecord, ModelRegistry
from shared.presence import FinetuneReport, NodeReport, Presence
from shared.settings import (
    NodeSettings,
    ServeSettings,
    Settings,
    load_settings,
    snapshot,
    with_overrides,
)
from shared.storage import Layout, write_json
from workers import devices, mps, redis_server
from workers.finetune_report import running_jobs
from workers.fleet import Fleet
from workers.gpus import GpuWatch
from workers.inference.engines.wire import socket_path
from workers.locks import exclusive
from workers.logfiles import log_path, safe_name
from workers.machine import look_at_machine, weight_bytes
from workers.placement import Placement, Seat, gpus_of, place
from workers.processes import Child, Program, State, python_program
from workers.serving import choose_models, engine_spec
from workers.strays import MARK, end_strays
from workers.training.gpulocks import GpuLocks
from workers.training.libraries import missing_libraries
from workers.training.process import SUPERVISOR_GRACE_S

log = get_logger(__name__)

TICK_S = 0.05
ANNOUNCE_S = 2.0
TRIM_LOGS_S = 60.0
REDIS_START_LIMIT_S = 120.0
MPS_START_LIMIT_S = 30.0
_ALL_ROLES = frozenset(NodeSettings.model_fields["roles"].default)
_USUAL_ROLES = (_ALL_ROLES, _ALL_ROLES - {"redis"}, _ALL_ROLES - {"redis", "api"})
"""What ``vlmq up`` and ``vlmq worker`` run if nobody says otherwise: whatever is possible here."""
RETRY_FAILED_S = 600.0
"""How soon an engine that cannot load its model is tried again: its disk may have come back."""
GRACE_S = 5.0
"""How much longer than its own drain limit a program may take before it is killed."""


class Story:
    """What the person at the terminal reads: one short line per event."""

    def __init__(self, write: Callable[[str], object] = sys.stdout.write) -> None:
        self._write = write

    def say(self, line: str) -> None:
        """Write one line now."""
        self._write(f"{line}\n")
        sys.stdout.flush()

    def child_changed(self, child: Child) -> None:
        """Tell a change of state, if it matters to a person."""
        name = child.program.name
        if child.state is State.READY:
            self.say(f"  {name} ready in {child.ready_after_s:.1f} s")
        elif child.state is State.RESTARTING:
            self.say(f"  {name} died ({child.detail})")
            self._quote(child)
        elif child.state is State.FAILED:
            outlook = "is given up" if child.next_start_at is None else "will be tried again"
            self.say(f"  {name} failed and {outlook}: {child.detail}")
            self._quote(child)

    def _quote(self, child: Child) -> None:
        for line in child.last_lines:
            self.say(f"    | {line}")
        self.say(f"    its log: {child.program.log}")


class Node:
    """The supervisor. ``run`` returns the exit status once everything has stopped."""

    def __init__(self, settings: Settings, story: Story | None = None) -> None:
        self._story = story or Story()
        self.settings = settings
        self._roles = set(settings.node.roles)
        self._children: dict[str, list[Child]] = {}
        self._fleet: Fleet | None = None
        self._stop_asked = threading.Event()
        self._hurry = False
        self._announcer: Announcer | None = None
        self._told_ready = False
        self._gpus = GpuWatch()

    def run(self) -> int:
        """Start what the roles say, watch it until SIGTERM or SIGINT, stop it in order.

        Raises: ConfigurationError if it cannot start at all, with nothing left running.
        """
        with ExitStack() as stack:
            stack.enter_context(self._signals())
            self._claim(stack)
            try:
                self._start_all(stack)
                self._watch()
            finally:
                self._stop_all()
                end_strays(self.settings.run_dir)
        return 0

    def stop(self) -> None:
        """Begin to stop; a second call kills whatever still runs."""
        self._hurry = self._stop_asked.is_set()
        self._stop_asked.set()

    # --- starting ---

    def _claim(self, stack: ExitStack) -> None:
        settings = self.settings
        run_dir = settings.run_dir
        make_private(run_dir)
        refusal = f"a node already runs with run_dir {run_dir}"
        stack.enter_context(exclusive(run_dir / "node.lock", refusal, wait_s=1))
        strays = end_strays(run_dir)
        if strays:
            self._story.say(f"ended {len(strays)} process(es) that an earlier run left behind")
        Layout(settings.data_dir).create()

    def _start_all(self, stack: ExitStack) -> None:
        settings, story = self.settings, self._story
        story.say(f"vlmq node '{settings.node.name}', data in {settings.data_dir}")
        _require_redis(settings)
        self._drop_impossible_roles()
        registry = ModelRegistry(Layout(settings.data_dir))
        serve = choose_models(settings, registry, story.say) if self._serves() else ()
        records = registry.by_name()
        placements = place_models(serve, records) if "engines" in self._roles else []
        self.settings = settings = with_overrides(
            settings,
            api={"port": self._free_port()},
            # Lets the reaper tell this run's dead workers from those of a later one.
            node={"run_id": new_id("run_")},
        )
        config = settings.run_dir / "settings.json"
        write_json(config, snapshot(settings))
        if "redis" in self._roles:
            self._start_redis(stack)
        if "engines" in self._roles and settings.node.mps:
            self._start_mps()
        if self._stop_asked.is_set():
            return
        programs = Programs(settings, config)
        if "engines" in self._roles:
            self._fleet = Fleet(
                settings,
                placements,
                records,
                make_program=programs.engine,
                tell=self._child_changed,
                say=story.say,
                changed=self._announce_soon,
            )
            self._fleet.tick()
            self._gpus.start()
        for role in ("reaper", "batch", "chat", "finetune", "api"):
            if role in self._roles:
                self._start(role, programs.of_role(role))
        self._announcer = Announcer(settings, self.report)

    def _drop_impossible_roles(self) -> None:
        """Fine-tunes need libraries that not every installation has.

        Raises: ConfigurationError if they are what this node is for.
        """
        if "finetune" not in self._roles:
            return
        missing = missing_libraries(self.settings.finetune.python)
        if not missing:
            return
        words = (
            f"the training libraries are missing ({', '.join(missing)}); install vlmq[training], or "
            "set finetune.python to an interpreter that has it"
        )
        if self._roles not in _USUAL_ROLES:
            raise ConfigurationError(f"the role 'finetune' is not possible here: {words}")
        self._roles.remove("finetune")
        self._story.say(f"  no fine-tunes run on this machine: {words}")

    def _serves(self) -> bool:
        return not self._roles.isdisjoint({"engines", "chat", "batch"})

    def _free_port(self) -> int:
        """The API's port, checked to be free now; a configured 0 becomes one that is."""
        api = self.settings.api
        if "api" not in self._roles:
            return api.port
        family = socket.AF_INET6 if ":" in api.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((api.host, api.port))
            except OSError as error:
                raise ConfigurationError(
                    f"the API cannot listen on {api.host}:{api.port} ({error.strerror}); "
                    "choose another with --port N"
                ) from None
            return int(probe.getsockname()[1])

    def _start_redis(self, stack: ExitStack) -> None:
        lock = stack.enter_context(redis_server.lock_data(self.settings))
        path = redis_server.socket_path(self.settings)
        program = Program(
            name="redis",
            command=redis_server.command(self.settings),
            log=self._log("redis"),
            ready=lambda: redis_server.answers(path),
            prepare=lambda: path.unlink(missing_ok=True),
            environment=self._mark(),
            pass_fds=(lock.fileno(),),
            restart_s=0.2,
        )
        self._start_first("redis", program, "the embedded Redis", REDIS_START_LIMIT_S)

    def _start_mps(self) -> None:
        settings = self.settings
        program = Program(
            name="mps",
            command=mps.command(),
            log=self._log("mps"),
            ready=lambda: mps.is_up(settings),
            prepare=lambda: mps.prepare(settings),
            environment={**self._mark(), **mps.environment(settings)},
            drain_s=GRACE_S,
        )
        self._start_first("mps", program, "NVIDIA's Multi-Process Service", MPS_START_LIMIT_S)

    def _start_first(self, role: str, program: Program, words: str, limit_s: float) -> None:
        """Start what the others cannot do without. Raises: ConfigurationError if it does not."""
        child = self._start(role, program)
        deadline = time.monotonic() + limit_s
        while child.state is not State.READY:
            if child.state is not State.STARTING or time.monotonic() > deadline:
                raise ConfigurationError(
                    f"{words} did not start: {child.detail or 'it takes too long'}"
                )
            if self._stop_asked.wait(TICK_S):
                return
            child.tick()

    def _start(self, role: str, program: Program) -> Child:
        child = Child(program, self._child_changed)
        self._children.setdefault(role, []).append(child)
        child.start()
        return child

    def _log(self, program: str) -> Path:
        return log_path(log_folder(self.settings), program)

    def _mark(self) -> dict[str, str]:
        return {MARK: str(self.settings.run_dir)}

    # --- watching ---

    def report(self) -> NodeReport:
        """What this node would say of itself now."""
        programs = {
            child.program.name: child.state.value
            for children in self._children.values()
            for child in children
        }
        fleet = self._fleet
        return NodeReport(
            node=self.settings.node.name,
            updated_at=unix_now(),
            replicas=fleet.reports() if fleet is not None else [],
            programs=programs,
            obtainable=fleet.obtainable() if fleet is not None else [],
            lent=fleet.lent() if fleet is not None else {},
            gpus=self._gpus.latest(),
            finetune=self._finetune_report(),
        )

    def _finetune_report(self) -> FinetuneReport | None:
        if "finetune" not in self._roles:
            return None
        gpus = self.settings.finetune.gpus
        locks = GpuLocks(self.settings.run_dir, gpus, served=tuple)
        return FinetuneReport(
            gpus_total=len(gpus),
            gpus_free=len(gpus) - len(locks.holders()),
            running=running_jobs(self.settings.run_dir),
        )

    def _watch(self) -> None:
        trim_at = time.monotonic() + TRIM_LOGS_S
        while not self._stop_asked.wait(TICK_S):
            for child in self._own():
                child.tick()
            if self._fleet is not None:
                self._fleet.tick()
            if not self._told_ready and self._all_ready():
                self._told_ready = True
                self._story.say(self._invitation())
            if time.monotonic() >= trim_at:
                trim_at = time.monotonic() + TRIM_LOGS_S
                for child in self._all():
                    child.trim_log()

    def _all_ready(self) -> bool:
        engines = self._fleet is None or self._fleet.settled
        return engines and all(child.state is State.READY for child in self._own())

    def _own(self) -> list[Child]:
        """Every program but the engines."""
        return [child for children in self._children.values() for child in children]

    def _engines(self) -> list[Child]:
        return [] if self._fleet is None else self._fleet.children

    def _all(self) -> list[Child]:
        return [*self._own(), *self._engines()]

    def _child_changed(self, child: Child) -> None:
        self._story.child_changed(child)
        self._announce_soon()

    def _announce_soon(self) -> None:
        if self._announcer is not None:
            self._announcer.soon()

    def _invitation(self) -> str:
        served = [] if self._fleet is None else self._fleet.models
        models = ", ".join(sorted(model.name for model in served))
        if "api" not in self._roles:
            return f"everything is up, serving {models or 'no model'}. Ctrl-C stops it."
        api = self.settings.api
        keys = KeyStore(Layout(self.settings.data_dir).keys)
        if keys.required():
            access = "requests need an API key"
        else:
            access = (
                "no API keys exist, so it listens on this machine only; "
                "make one with: vlmq keys create OWNER"
            )
        return (
            f"API on http://{api.host}:{api.port}/v1 ({access})\n"
            f"chat in a browser on http://{api.host}:{api.port}/\n"
            f"everything is up, serving {models or 'no model'}. Ctrl-C stops it."
        )

    # --- stopping ---

    def _stop_all(self) -> None:
        if not self._children and self._fleet is None:
            return
        self._story.say("stopping: what is in hand is finished first (Ctrl-C again: at once)")
        # Trainings save a checkpoint, which may take long, while everything else stops.
        trainers = self._children.get("finetune", [])
        for child in trainers:
            child.stop()
        # The API finishes the answers it streams, for which it needs the chat consumer, which
        # needs the engines; batches stop claiming work meanwhile. Redis outlives them all.
        for stage in (("api", "batch"), ("chat",)):
            self._stop_stage([child for role in stage for child in self._children.get(role, [])])
        if self._fleet is not None:
            self._fleet.stop(self.settings.queue.drain_s + GRACE_S)
            self._stop_stage(self._engines())
            self._fleet.close()
        self._stop_stage(self._children.get("mps", []))
        self._stop_stage(trainers)
        self._stop_stage(self._children.get("reaper", []))
        if self._announcer is not None:
            self._announcer.close()
        self._stop_stage(self._children.get("redis", []))
        self._story.say("stopped")

    def _stop_stage(self, stage: list[Child]) -> None:
        for child in stage:
            if child.state is not State.STOPPING:
                child.stop()
        while any(child.state is not State.STOPPED for child in stage):
            if self._hurry:
                for child in stage:
                    child.kill()
            # The later stages are still needed, so what dies there is started again.
            for child in self._own():
                child.tick()
            if self._fleet is not None:
                self._fleet.tick_children()
            time.sleep(TICK_S)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def on_signal(_number: int, _frame: FrameType | None) -> None:
            self.stop()

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, on_signal) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


class Programs:
    """The command lines of vlmq's own programs."""

    def __init__(self, settings: Settings, config: Path) -> None:
        self._settings = settings
        self._config = config

    def of_role(self, role: str) -> Program:
        """The program of the role ``reaper``, ``batch``, ``chat``, ``finetune`` or ``api``."""
        drain_s = self._settings.queue.drain_s
        stop_s = self._settings.finetune.stop_s + SUPERVISOR_GRACE_S
        match role:
            case "reaper":
                return self._program(role, "workers.reaper", drain_s=GRACE_S)
            case "batch" | "chat":
                return self._program(role, "workers.consumer", role, drain_s=drain_s + GRACE_S)
            case "finetune":
                return self._program(role, "workers.consumer", role, drain_s=stop_s + GRACE_S)
            case "api":
                return self._program(role, "api.server", drain_s=drain_s + GRACE_S)
        raise ConfigurationError(f"there is no role '{role}'")

    def engine(
        self,
        entry: ServeSettings,
        seat: Seat,
        record: ModelRecord,
        may_start: Callable[[], bool] = lambda: True,
    ) -> Program:
        """One replica, its GPU pinned before anything is imported."""
        settings = self._settings
        name = f"engine {entry.model}/{seat.number}"
        path = socket_path(settings.run_dir, entry.model, seat.number)
        spec_file = path.with_suffix(".spec.json")
        spec_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(spec_file, engine_spec(entry, record, seat.share))
        pinned = devices.on_processor()
        if seat.gpus:
            pinned = {**devices.environment(seat.visible), **mps.environment(settings)}
        # An engine that makes room or is replaced finishes all it has; a stopping node says less.
        drain_s = settings.api.request_timeout_s
        return Program(
            name=name,
            command=python_program(
                "workers.inference.engines.host",
                *("--engine", entry.engine),
                *("--socket", str(path)),
                *("--replica", str(seat.number)),
                *("--spec", str(spec_file)),
                *("--drain-limit-s", str(drain_s)),
                *("--warm-up-limit-s", str(settings.node.warm_up_limit_s)),
            ),
            log=log_path(log_folder(settings), name),
            ready=path.exists,
            prepare=lambda: path.unlink(missing_ok=True),
            may_start=may_start,
            environment={MARK: str(settings.run_dir), **pinned},
            retry_failed_s=RETRY_FAILED_S,
            restart_s=settings.node.engine_restart_s,
            drain_s=drain_s + GRACE_S,
        )

    def _program(self, role: str, module: str, *arguments: str, drain_s: float) -> Program:
        settings = self._settings
        api = settings.api
        ready = (lambda: healthy(api.host, api.port)) if role == "api" else None
        return Program(
            name=role,
            command=python_program(module, *arguments, "--config", str(self._config)),
            log=log_path(log_folder(settings), role),
            ready=ready,
            environment={MARK: str(settings.run_dir)},
            drain_s=drain_s,
        )


class Announcer:
    """A thread that tells Redis every ANNOUNCE_S, and at once after a change, how the node is.

    It is apart from the watching so that a Redis that hangs cannot delay a restart.
    """

    def __init__(self, settings: Settings, report: Callable[[], NodeReport]) -> None:
        self._redis = connect(settings, max_connections=2)
        self._presence = Presence(self._redis)
        self._node = settings.node.name
        self._report = report
        self._wake = threading.Event()
        self._closing = False
        self._silent = False
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)
        self._thread.start()

    def soon(self) -> None:
        """Announce without waiting for the next turn."""
        self._wake.set()

    def close(self) -> None:
        """Stop announcing and take the node off the list."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=2)
        self._redis.close()

    def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            self._try(lambda: self._presence.announce(self._report()))
            self._wake.wait(ANNOUNCE_S)
        self._try(lambda: self._presence.forget(self._node))

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except QueueUnavailable as error:
            if not self._silent:
                log.warning("cannot announce this node", reason=error.message)
            self._silent = True
        except Exception:
            log.exception("cannot announce this node")
        else:
            self._silent = False


def place_models(
    serve: Sequence[ServeSettings], records: Mapping[str, ModelRecord]
) -> list[Placement]:
    """Where each served model's replicas run on this machine.

    Raises: ConfigurationError if what is always loaded does not fit.
    """
    automatic = any(entry.replicas == "auto" for entry in serve)
    gpus = [gpu for entry in serve for gpu in gpus_of(entry)]
    weights = {
        entry.model: weight_bytes(records[entry.model].path) if automatic else None
        for entry in serve
    }
    return place(serve, weights, look_at_machine(gpus if automatic else ()))


def log_folder(settings: Settings) -> Path:
    """Where the logs of this node's programs are."""
    return settings.data_dir / "logs" / safe_name(settings.node.name)


def make_private(run_dir: Path) -> None:
    """Create ``run_dir`` for this user only.

    Raises: ConfigurationError if it belongs to somebody else or others may enter it.
    """
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = run_dir.lstat()
    except OSError as error:
        raise StorageFailed(f"cannot create {run_dir}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConfigurationError(f"{run_dir} is not a folder of yours; set storage.run_dir")
    run_dir.chmod(0o700)


def healthy(host: str, port: int) -> bool:
    """Whether an HTTP server there answers ``GET /healthz`` with 200."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared only
    connection = http.client.HTTPConnection(reachable, port, timeout=0.5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _require_redis(settings: Settings) -> None:
    """Raise ConfigurationError if nothing says where Redis is, or its password cannot be read."""
    server_of(settings)
    if settings.redis.url is not None or "redis" in settings.node.roles:
        return
    if not redis_server.answers(redis_server.socket_path(settings)):
        raise ConfigurationError(
            "this node has no Redis: set redis.url (all nodes of one system share it), "
            "or add the role 'redis'"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a node and return its exit status: 0 after a stop, 1 if it could not start."""
    parser = argparse.ArgumentParser(prog="vlmq-node", description="One machine's part of vlmq.")
    parser.add_argument("--config", type=Path, help="TOML file, or a snapshot in JSON")
    parser.add_argument("--discard-config", action="store_true", help="delete the file once read")
    parser.add_argument("--role", action="append", help="run only these roles")
    args = parser.parse_args(arguments)
    try:
        settings = load_settings(args.config)
        if args.discard_config and args.config is not None:
            args.config.unlink()
        if args.role:
            settings = with_overrides(settings, node={"roles": args.role})
        configure("node", level=settings.log_level)
        return Node(settings).run()
    except VlmqError as error:
        _give_up(error)


def _give_up(error: VlmqError) -> NoReturn:
    sys.exit(f"vlmq: {error.message}")


if __name__ == "__main__":
    sys.exit(main())
