"""What vlmq does with GPUs when things break: ``python -m benchmarks.gpu.faults``.

A killed engine, broken pictures, prompts that are too long, damaged checkpoints, a full GPU. Every
item is counted. The exit status is 1 if anything was lost, answered twice, or refused unclearly.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.gpu.accounts import Accounts, account
from benchmarks.gpu.mutations import write_mutated
from benchmarks.gpu.nodes import prepared_node, replicas, start
from benchmarks.gpu.opening import add_common, conducted, prepare
from benchmarks.gpu.scale import GpuScale, Sizes
from benchmarks.gpu.session import Session
from benchmarks.gpu.setups import Sections, setup_of
from benchmarks.gpu.work import MODEL, WORKS, item_lines, write_input
from benchmarks.http_batches import TERMINAL, BatchClient
from benchmarks.report import Figure, Target
from shared.errors import QueueUnavailable
from shared.presence import ReplicaReport
from tests.running_node import RunningNode

_SCALE = GpuScale({"448": Sizes(ours=20_000, raw=0, distinct=1024, warm_up=64)})
_DRY = GpuScale({"448": Sizes(ours=3_000, raw=0, distinct=16, warm_up=16)})
_MUTATED = 1_000
_NEW_TOKENS = 16
_KILL_AFTER = 1 / 3
_LOAD_LIMIT_S = 240.0
_REFUSAL_LIMIT_S = 150.0
_POLL_S = 0.1
_NONE = Target("<=", 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Break what was asked for and return the exit status."""
    args = _parse(arguments)

    def measure(session: Session) -> None:
        session.rows = ["448"]
        prepare(session)
        for case in args.only or CASES:
            CASES[case](session, session.backends[0])

    return conducted(args, _DRY if args.engine == "echo" else _SCALE, measure)


def _report(
    session: Session, case: str, name: str, value: float, made_of: str, **more: object
) -> None:
    unit, target = str(more.get("unit", "")), more.get("target")
    assert target is None or isinstance(target, Target)
    session.results.faults.append(Figure(case, name, value, unit, target, made_of))
    session.clock.say(f"{case}: {name} {value:g} ({made_of})")


# --- with a node that works ---


def _running(session: Session, backend: str) -> None:
    """A killed engine, broken pictures, too long prompts: one node for all three."""
    with session.step(f"{backend}: a node of several replicas"):
        sections = _several(setup_of(backend, session.gpus, session.changes))
        roots = [session.photo_folder]
        with prepared_node(sections, session.checkpoint, roots) as node:
            load_s = start(node, session.clock.limit(_LOAD_LIMIT_S))
            session.clock.say(f"{len(replicas(node))} replicas loaded in {load_s:.0f} s")
            client = BatchClient(node.base_url)
            with session.step("kill -9 of a replica"):
                _kill(session, node, client)
            with session.step("broken pictures"):
                _mutations(session, node, client)
            with session.step("a prompt longer than the session"):
                _too_long(session, node)


def _several(sections: Sections) -> Sections:
    """At least two replicas; two TurboMinds on one GPU share its memory."""
    serve = sections["serve"]
    serve["replicas"] = max(serve["replicas"], 2)
    return sections


def _kill(session: Session, node: RunningNode, client: BatchClient) -> None:
    items = session.scale.rows["448"].ours
    batch_id = _submit(session, client, session.photos_of("448"), items)
    deadline = time.monotonic() + session.clock.limit(400)
    victim, killed_at, back_after_s = 0, 0.0, 0.0
    while (batch := client.batch(batch_id))["status"] not in TERMINAL:
        if time.monotonic() > deadline:
            client.cancel(batch_id)
            raise TimeoutError(f"the batch is {batch['status']}: {batch['request_counts']}")
        if not victim and batch["request_counts"]["completed"] >= _KILL_AFTER * items:
            victim, killed_at = _first_pid(node), time.monotonic()
            os.kill(victim, signal.SIGKILL)
            session.clock.say(f"killed {victim} at {batch['request_counts']}")
        if victim and not back_after_s and _is_whole_again(node, victim):
            back_after_s = time.monotonic() - killed_at
        time.sleep(_POLL_S)
    assert victim, "the batch ended before the kill; give it more items with --size 448.ours"
    accounts = _accounts(client, batch, items)
    _report_accounts(session, "kill -9 of a replica", accounts)
    if back_after_s:
        _report(
            session, "kill -9 of a replica", "replica ready again after", back_after_s, "", unit="s"
        )
    assert batch["status"] == "completed", f"the batch ended {batch['status']}"


def _first_pid(node: RunningNode) -> int:
    pid = replicas(node)[0].pid
    assert pid in node.engine_pids(), f"the node reports {pid}, which is none of its engines"
    return int(pid)


def _is_whole_again(node: RunningNode, victim: int) -> bool:
    found = replicas(node)
    return all(replica.state == "ready" and replica.pid != victim for replica in found)


def _mutations(session: Session, node: RunningNode, client: BatchClient) -> None:
    """No engine dies of a broken picture, and each gets its answer or its reason."""
    photos = write_mutated(
        session.photo_folder / "mutated", session.photos_of("448")[:16], _MUTATED
    )
    _wait_until_whole(session, node)
    before = {(replica.replica, replica.pid) for replica in replicas(node)}
    batch_id = _submit(session, client, photos, _MUTATED)
    batch = client.wait(batch_id, session.clock.limit(200))
    accounts = _accounts(client, batch, _MUTATED)
    _report_accounts(session, "broken pictures", accounts)
    time.sleep(3)  # longer than the node's own interval of reporting
    after = {(replica.replica, replica.pid) for replica in replicas(node)}
    died = len(before - after)
    _report(
        session, "broken pictures", "engines that died", died, f"of {len(before)}", target=_NONE
    )
    for code, message in accounts.examples.items():
        session.note(f"broken pictures, {code}: {message}")


def _wait_until_whole(session: Session, node: RunningNode) -> None:
    deadline = time.monotonic() + session.clock.limit(_LOAD_LIMIT_S)
    while not all(replica.state == "ready" for replica in replicas(node)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not every replica came back:\n{node.story()}")
        time.sleep(_POLL_S)


def _too_long(session: Session, node: RunningNode) -> None:
    """Refused with its own code, and the next one is answered."""
    session_len = node.settings.node.serve[0].session_len
    url = f"{node.base_url}/chat/completions"

    def ask(text: str) -> httpx.Response:
        message = {"role": "user", "content": text}
        body = {"model": MODEL, "messages": [message], "max_tokens": _NEW_TOKENS}
        return httpx.post(url, json=body, timeout=60)

    refused, answered = ask("word " * 2 * session_len), ask("word")
    error = refused.json().get("error", {})
    right = (refused.status_code, error.get("code")) == (400, "context_length_exceeded")
    right = right and answered.status_code == 200
    _report(
        session,
        "a prompt longer than the session",
        "wrong outcomes",
        0 if right else 1,
        f"HTTP {refused.status_code}: {error.get('message')}; the next: HTTP {answered.status_code}",
        target=_NONE,
    )


def _submit(session: Session, client: BatchClient, photos: Sequence[Path], items: int) -> str:
    source = session.folder / "faults.jsonl"
    write_input(source, item_lines(photos, WORKS["448"], items, _NEW_TOKENS))
    return client.submit(client.upload(source))


def _accounts(client: BatchClient, batch: dict[str, object], items: int) -> Accounts:
    def lines(key: str) -> Iterator[bytes]:
        return client.output_lines(str(batch[key])) if batch[key] else iter(())

    return account(lines("output_file_id"), lines("error_file_id"), items)


def _report_accounts(session: Session, case: str, accounts: Accounts) -> None:
    _report(session, case, "items", accounts.items, accounts.told())
    _report(
        session,
        case,
        "items without exactly one line",
        accounts.unaccounted,
        f"{accounts.missing} missing, {accounts.repeated} repeated",
        target=_NONE,
    )


# --- with a node that must refuse ---


def _cut_weights(session: Session, backend: str) -> None:
    """A safetensors file that ends half way."""

    def spoil(folder: Path) -> None:
        weights = min(folder.glob("*.safetensors"))
        whole = weights.stat().st_size
        weights.unlink()
        with open(_checkpoint(session) / weights.name, "rb") as source, open(weights, "wb") as cut:
            shutil.copyfileobj(source, cut, 1 << 24)
            cut.truncate(whole // 2)

    _must_refuse(session, backend, "a cut safetensors file", spoil)


def _no_config(session: Session, backend: str) -> None:
    """A folder that lost its config.json after it was linked."""
    _must_refuse(
        session,
        backend,
        "a folder without config.json",
        lambda folder: (folder / "config.json").unlink(),
    )


def _out_of_memory(session: Session, backend: str) -> None:
    """Another program holds the GPU's memory; the node asks for nearly all of it."""
    if session.results.dry:
        session.note("out of memory: needs a GPU")
        return
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": session.gpus[0]}
    eater = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.eater"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    try:
        assert eater.stdout is not None
        assert eater.stdout.readline(), "the GPU's memory could not be taken; see above"
        changes = ["serve.options.cache_max_entry_count=0.95"]
        _must_refuse(session, backend, "a GPU whose memory is taken", lambda _: None, changes)
    finally:
        eater.kill()
        eater.wait()


def _must_refuse(
    session: Session,
    backend: str,
    case: str,
    spoil: Callable[[Path], None],
    changes: Sequence[str] = (),
) -> None:
    """Start a node with one replica of a spoilt checkpoint: it must say why, and soon."""
    if session.results.dry:
        session.note(f"{case}: needs a model")
        return
    with session.step(case), _copy(session) as folder:
        gpus = session.gpus[:1]
        sections = setup_of(backend, gpus, [*session.changes, "serve.replicas=1", *changes])
        with prepared_node(sections, folder, [session.photo_folder]) as node:
            spoil(folder)
            began = time.monotonic()
            node.launch()
            replica = _first_word(node, session.clock.limit(_REFUSAL_LIMIT_S))
            elapsed_s = time.monotonic() - began
            clear = replica.state == "failed" and bool(replica.detail)
            told = f"{replica.state} after {elapsed_s:.0f} s: {replica.detail}"
            _report(session, case, "unclear refusals", 0 if clear else 1, told, target=_NONE)


def _checkpoint(session: Session) -> Path:
    assert session.checkpoint is not None
    return session.checkpoint


@contextmanager
def _copy(session: Session) -> Iterator[Path]:
    """The checkpoint as a folder of links, to be spoilt."""
    folder = session.folder / "spoilt"
    shutil.copytree(_checkpoint(session), folder, copy_function=os.link)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _first_word(node: RunningNode, limit_s: float) -> ReplicaReport:
    """What the only replica becomes: ready, failed, or dead and to be started again."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            found = replicas(node)
        except QueueUnavailable:
            found = []  # its Redis is still starting
        if found and (found[0].state in {"ready", "failed"} or found[0].restarts):
            return found[0]
        assert node.process is not None
        assert node.process.poll() is None, f"the node itself ended:\n{node.story()}"
        time.sleep(_POLL_S)
    raise TimeoutError(f"no word of the replica in {limit_s:.0f} s:\n{node.story()}")


CASES: dict[str, Callable[[Session, str], None]] = {
    "running": _running,
    "cut-weights": _cut_weights,
    "no-config": _no_config,
    "out-of-memory": _out_of_memory,
}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.faults", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", action="extend", choices=CASES, metavar="CASE", help=", ".join(CASES)
    )
    add_common(parser, backends="pytorch", out="gpu-faults.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
