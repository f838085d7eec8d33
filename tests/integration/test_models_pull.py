"""``vlmq models pull`` against a hub on loopback, and from folders; the library is the real one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli import main
from cli.hub import Hub
from cli.pull import MARKER, HubSource, Silent, pull
from shared.checkpoints import check_checkpoint
from shared.errors import HubUnavailable
from shared.models import ModelRecord, ModelRegistry, ModelSource
from shared.storage import Layout
from tests.checkpoints import safetensors, write_checkpoint, write_sharded
from tests.faults.test_storage_full import fill, small_disk
from tests.integration.hub_server import COMMIT, REPO, FakeHub, serving
from tests.running_node import wait_for

BIG = safetensors({"w": ("U8", [3 << 20], 3 << 20)})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with a whole checkpoint and much that is no part of one."""
    files = _content(write_checkpoint(tmp_path / "origin"))
    files |= {
        "model.safetensors": BIG,
        ".gitattributes": b"*.safetensors lfs",
        "README.md": b"# A model",
        "LICENSE": b"terms",
        "pytorch_model.bin": b"a pickle",
        "optimizer.pt": b"a pickle",
        "other.safetensors": b"not named anywhere",
        "onnx/model.onnx": b"onnx",
    }
    with serving(FakeHub(files)) as found:
        yield found


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token and no settings of whoever runs the tests."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("VLMQ_STORAGE__MIN_FREE_BYTES", "0")


def _content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run_pull(data_dir: Path, *options: str, repo: str = REPO, at: FakeHub | None = None) -> int:
    """Run the command in this process; returns the exit status."""
    where = ("--endpoint", at.address) if at else ()
    place = ("--data-dir", str(data_dir))
    return main.run(["models", "pull", repo, "--name", "m", *where, *options, *place])


def record(data_dir: Path) -> ModelRecord:
    """The model's record."""
    return ModelRegistry(Layout(data_dir)).get("m")


def final(data_dir: Path, revision: str = COMMIT) -> Path:
    """Where a pull ends."""
    return data_dir / "checkpoints" / "m" / revision


def nothing_linked(data_dir: Path) -> bool:
    """Neither a record nor a folder under its final name."""
    return not ModelRegistry(Layout(data_dir)).list() and not final(data_dir).exists()


def leftovers(data_dir: Path) -> list[str]:
    """Hidden names beside the final folder."""
    return [path.name for path in (data_dir / "checkpoints" / "m").glob(".*")]


def test_a_checkpoint_is_fetched_checked_and_linked(
    hub: FakeHub, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the files it needs and no others, its exact commit and the terms given."""
    assert run_pull(data_dir, "--default", "temperature=0", at=hub) == 0
    expected = {"config.json", "tokenizer.json", "model.safetensors", "LICENSE", MARKER}
    assert set(_content(final(data_dir))) == expected
    assert (final(data_dir) / "model.safetensors").read_bytes() == BIG
    found = record(data_dir)
    assert found.path == str(final(data_dir))
    assert found.source == ModelSource(hub.address, REPO, COMMIT)
    assert (found.defaults.temperature, found.trust_remote_code) == (0, False)
    assert leftovers(data_dir) == []
    told = capsys.readouterr()
    assert "model.safetensors is complete" in told.err
    assert "linked m to" in told.err
    assert told.out == ""


def test_a_second_pull_does_nothing(
    hub: FakeHub, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By branch it asks the hub where that is now; by commit it asks nobody."""
    assert run_pull(data_dir, at=hub) == 0
    before = record(data_dir)
    hub.requests.clear()
    assert run_pull(data_dir, at=hub) == 0
    assert [path for path, _ in hub.requests] == [f"/api/models/{REPO}/revision/main"]
    hub.requests.clear()
    capsys.readouterr()
    assert run_pull(data_dir, "--revision", COMMIT, "--json", at=hub) == 0
    assert hub.requests == []
    result = json.loads(capsys.readouterr().out)
    assert (result["fetched"], result["linked"]) == (False, False)
    assert result["source"]["revision"] == COMMIT
    assert result["weights_bytes"] == 3 << 20
    assert record(data_dir) == before


def test_other_terms_or_another_revision_need_consent_to_replace(
    hub: FakeHub, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before anything is fetched; the old folder stays."""
    assert run_pull(data_dir, at=hub) == 0
    assert run_pull(data_dir, "--default", "top_k=3", at=hub) == 1
    assert run_pull(data_dir, "--default", "top_k=3", "--replace", at=hub) == 0
    assert record(data_dir).defaults.top_k == 3
    hub.revisions["main"] = "f" * 40
    hub.requests.clear()
    assert run_pull(data_dir, at=hub) == 1
    assert len(hub.requests) == 1
    assert "--replace" in capsys.readouterr().err
    assert run_pull(data_dir, "--replace", at=hub) == 0
    assert record(data_dir).path == str(final(data_dir, "f" * 40))
    assert final(data_dir).is_dir()


def test_shards_are_those_of_the_index(hub: FakeHub, data_dir: Path, tmp_path: Path) -> None:
    """Other files of weights stay where they are; one that is not listed is told at once."""
    sharded = _content(write_sharded(tmp_path / "sharded"))
    hub.files = sharded | {"consolidated.safetensors": b"the same again"}
    assert run_pull(data_dir, at=hub) == 0
    assert set(_content(final(data_dir))) == {*sharded, MARKER}


def test_a_shard_that_the_hub_lacks_is_told_before_the_others_are_fetched(
    hub: FakeHub, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its name."""
    hub.files = _content(write_sharded(tmp_path / "sharded"))
    del hub.files["model-00002-of-00002.safetensors"]
    assert run_pull(data_dir, at=hub) == 1
    assert "model-00002-of-00002.safetensors, which is not there" in capsys.readouterr().err
    assert hub.asked_for("model-00001-of-00002.safetensors") == []
    assert nothing_linked(data_dir)


def test_a_connection_that_is_cut_goes_on_where_it_ended(hub: FakeHub, data_dir: Path) -> None:
    """Within one command; each request asks for the rest only."""
    hub.cuts["model.safetensors"] = [1_000_000, 500_000]
    assert run_pull(data_dir, at=hub) == 0
    ranges = hub.asked_for("model.safetensors")
    assert ranges == [None, "bytes=1000000-", "bytes=1500000-"]
    assert (final(data_dir) / "model.safetensors").read_bytes() == BIG


def test_a_server_that_ignores_ranges_is_asked_for_all_again(hub: FakeHub, data_dir: Path) -> None:
    """Pieces are never put together wrongly."""
    hub.no_ranges = True
    hub.cuts["model.safetensors"] = [1_000_000]
    assert run_pull(data_dir, at=hub) == 0
    assert (final(data_dir) / "model.safetensors").read_bytes() == BIG


def test_a_hub_that_keeps_failing_is_given_up_and_what_came_is_kept(
    hub: FakeHub, data_dir: Path
) -> None:
    """A later pull goes on from there."""
    hub.cuts["model.safetensors"] = [1_000_000, *[0] * 20]
    source = ModelSource(hub.address, REPO, COMMIT)
    for _ in range(2):
        client = Hub(hub.address, pause_s=0.001)
        with pytest.raises(HubUnavailable, match="what has arrived is kept"):
            pull(
                HubSource(client, REPO, "main"),
                source,
                final(data_dir),
                pickles=False,
                keep_free=0,
                progress=Silent(),
            )
        client.close()
    assert nothing_linked(data_dir)
    hub.cuts.clear()
    hub.requests.clear()
    assert run_pull(data_dir, at=hub) == 0
    assert hub.asked_for("model.safetensors") == ["bytes=1000000-"]
    assert hub.asked_for("config.json") == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_pull_that_is_stopped_goes_on(
    hub: FakeHub, data_dir: Path, number: signal.Signals
) -> None:
    """Given a process that ends half way, then nothing is linked and the next needs the rest only."""
    hub.block_pause_s = 0.05
    command = [sys.executable, "-m", "cli.main", "models", "pull", REPO, "--name", "m"]
    command += ["--endpoint", hub.address, "--data-dir", str(data_dir)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    part = final(data_dir).with_name(f".{COMMIT}.{COMMIT}.part") / "model.safetensors.part"
    wait_for(lambda: part.exists() and part.stat().st_size > 500_000, "half a file", 60)
    busy = run_pull(data_dir, at=hub)
    child.send_signal(number)
    _, told = child.communicate(timeout=60)
    assert busy == 1, "two at once would write over each other"
    assert child.returncode == (130 if number == signal.SIGINT else -number)
    assert ("the same command goes on from here" in told) == (number == signal.SIGINT)
    assert nothing_linked(data_dir)
    have = part.stat().st_size
    assert 500_000 < have < len(BIG)
    hub.block_pause_s = 0
    hub.requests.clear()
    assert run_pull(data_dir, at=hub) == 0
    assert hub.asked_for("model.safetensors") == [f"bytes={have}-"]
    assert (final(data_dir) / "model.safetensors").read_bytes() == BIG


def test_a_pull_that_ended_before_linking_is_linked_by_the_next(
    hub: FakeHub, data_dir: Path
) -> None:
    """The folder is there already, so only the record is written."""
    assert run_pull(data_dir, at=hub) == 0
    ModelRegistry(Layout(data_dir)).remove("m")
    hub.requests.clear()
    assert run_pull(data_dir, "--revision", COMMIT, at=hub) == 0
    assert hub.requests == []
    assert record(data_dir).source is not None


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_corrupt_file_is_deleted_and_fetched_by_the_next_pull(
    hub: FakeHub, data_dir: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the right size with one wrong bit, by sha256 or by git's digest."""
    content = bytearray(hub.files[name])
    content[-1] ^= 1
    hub.sent[name] = bytes(content)
    assert run_pull(data_dir, at=hub) == 1
    assert f"{name} arrived with other bytes" in capsys.readouterr().err
    assert nothing_linked(data_dir)
    hub.sent.clear()
    hub.requests.clear()
    assert run_pull(data_dir, at=hub) == 0
    assert hub.asked_for(name) == [None]
    assert hub.asked_for("config.json") == []


def test_a_file_longer_than_listed_is_refused(
    hub: FakeHub, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not written beyond that."""
    hub.sent["model.safetensors"] = BIG + bytes(1 << 20)
    assert run_pull(data_dir, at=hub) == 1
    assert "is longer than" in capsys.readouterr().err
    assert nothing_linked(data_dir)


def test_weights_that_do_not_fit_their_header_are_not_linked(
    hub: FakeHub, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although the hub has them just so."""
    hub.files["model.safetensors"] = BIG[:-1]
    assert run_pull(data_dir, at=hub) == 1
    assert "damaged or cut short" in capsys.readouterr().err
    assert nothing_linked(data_dir)


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (401, None, "HF_TOKEN"),
        (403, "GatedRepo", "ask for access on the model's page"),
        (403, None, "ask for access"),
        (404, "RepoNotFound", "check its name"),
        (503, None, "the same command goes on"),
    ],
)
def test_a_refusal_says_what_to_do(
    hub: FakeHub,
    data_dir: Path,
    status: int,
    code: str | None,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each with its status."""
    hub.status, hub.error_code = status, code
    assert run_pull(data_dir, at=hub) == 1
    message = capsys.readouterr().err
    assert told in message
    assert str(status) in message
    assert nothing_linked(data_dir)


def test_an_unknown_repository_or_revision_is_told(
    hub: FakeHub, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which of the two it is."""
    assert run_pull(data_dir, repo="org/other", at=hub) == 1
    assert "has no org/other" in capsys.readouterr().err
    assert run_pull(data_dir, "--revision", "v9", at=hub) == 1
    assert "has no revision 'v9'" in capsys.readouterr().err
    assert run_pull(data_dir, repo="a/b/c", at=hub) == 1
    assert "ORGANISATION/MODEL" in capsys.readouterr().err


def test_a_file_that_the_hub_forbids_is_named(
    hub: FakeHub, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Listings of gated models may be open while their files are not."""
    hub.statuses["model.safetensors"] = 403
    assert run_pull(data_dir, at=hub) == 1
    assert "does not let you have model.safetensors of org/model" in capsys.readouterr().err
    assert nothing_linked(data_dir)


def test_no_network_is_said(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the way that needs none."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    assert run_pull(data_dir, "--endpoint", address) == 1
    message = capsys.readouterr().err
    assert "cannot be reached" in message
    assert "--from" in message


def test_the_token_is_sent_to_the_hub_only_and_never_shown(
    hub: FakeHub, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not to the host that large files are redirected to."""
    (tmp_path / "token").write_text("hf_secret\n")
    hub.redirected = True
    assert run_pull(data_dir, "--token-file", str(tmp_path / "token"), at=hub) == 0
    sent = {path: headers.get("authorization") for path, headers in hub.requests}
    assert sent.pop("/cdn/model.safetensors") is None
    assert set(sent.values()) == {"Bearer hf_secret"}
    told = capsys.readouterr()
    assert "hf_secret" not in told.out + told.err
    kept = b"".join(path.read_bytes() for path in data_dir.rglob("*") if path.is_file())
    assert b"hf_secret" not in kept


def test_the_token_of_the_environment_is_used(
    hub: FakeHub, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library does."""
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert run_pull(data_dir, at=hub) == 0
    assert {headers.get("authorization") for _, headers in hub.requests} == {"Bearer hf_other"}


@pytest.mark.parametrize(
    "name",
    ["../x.py", "/etc/x.py", "a/../../x.py", "a//x.py", "..", "a\\..\\x.py", "x\n.py", "\ud800.py"],
)
def test_a_listing_that_leads_out_of_the_folder_is_refused_whole(
    hub: FakeHub, data_dir: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is fetched from such a hub."""
    hub.extra = [{"rfilename": name, "size": 1, "blobId": "0" * 40}]
    assert run_pull(data_dir, at=hub) == 1
    assert "leads out of its folder" in capsys.readouterr().err
    assert len(hub.requests) == 1
    assert nothing_linked(data_dir)


@pytest.mark.parametrize("commit", ["../../../x", "", "a/b", ".."])
def test_a_commit_that_is_no_name_is_refused(hub: FakeHub, data_dir: Path, commit: str) -> None:
    """It would become a folder's name."""
    hub.revisions["main"] = commit
    assert run_pull(data_dir, at=hub) == 1
    assert not (data_dir / "checkpoints").exists()


def test_code_is_fetched_and_not_consented_to(
    hub: FakeHub, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record says no until whoever links it says yes."""
    hub.files |= {"modeling_x.py": b"print()", "parts/__init__.py": b""}
    assert run_pull(data_dir, at=hub) == 0
    assert (final(data_dir) / "parts" / "__init__.py").read_bytes() == b""
    assert "carries its own code (modeling_x.py)" in capsys.readouterr().err
    assert record(data_dir).trust_remote_code is False
    assert run_pull(data_dir, "--replace", "--trust-remote-code", at=hub) == 0
    assert record(data_dir).trust_remote_code is True


def test_pickles_alone_are_refused_without_consent(
    hub: FakeHub, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the reason, before they are fetched."""
    del hub.files["model.safetensors"]
    assert run_pull(data_dir, at=hub) == 1
    assert "reading a pickle can run code" in capsys.readouterr().err
    assert hub.asked_for("pytorch_model.bin") == []
    assert run_pull(data_dir, "--trust-remote-code", at=hub) == 0
    assert (final(data_dir) / "pytorch_model.bin").exists()


def test_a_disk_without_room_is_told_before_the_download(
    hub: FakeHub, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the figures, what is kept free included."""
    target = tmp_path / "small"
    target.mkdir()
    with small_disk(target, 2):
        assert run_pull(data_dir, "--to", str(target / "m"), at=hub) == 1
        message = capsys.readouterr().err
        assert re.search(r"org/model needs 3\.00 MiB more.*the disk has [12]\.\d\d MiB", message)
        assert "--to" in message
        assert hub.asked_for("model.safetensors") == []


def test_a_disk_that_fills_up_half_way_keeps_what_came(
    hub: FakeHub, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given room again, then the same command goes on."""
    target = tmp_path / "small"
    target.mkdir()
    with small_disk(target, 5):
        hub.block_pause_s = 0.02
        command = [sys.executable, "-m", "cli.main", "models", "pull", REPO, "--name", "m"]
        command += ["--endpoint", hub.address, "--data-dir", str(data_dir)]
        child = subprocess.Popen(
            [*command, "--to", str(target / "m")], stderr=subprocess.PIPE, text=True
        )
        part = target / f".m.{COMMIT}.part" / "model.safetensors.part"
        wait_for(lambda: part.exists() and part.stat().st_size > 500_000, "half a file", 60)
        ballast = fill(target)
        _, told = child.communicate(timeout=60)
        assert child.returncode == 1
        assert "no space left" in told
        assert "the same command goes on" in told
        have = part.stat().st_size
        assert nothing_linked(data_dir)
        ballast.unlink()
        hub.requests.clear()
        assert run_pull(data_dir, "--to", str(target / "m"), at=hub) == 0
        assert hub.asked_for("model.safetensors") == [f"bytes={have}-"]
        check_checkpoint(target / "m")


def test_a_folder_of_something_else_is_left_alone(
    hub: FakeHub, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only an empty one is taken."""
    target = tmp_path / "mine"
    target.mkdir()
    (target / "diary.txt").write_text("dear")
    assert run_pull(data_dir, "--to", str(target), at=hub) == 1
    assert "was not pulled by this command" in capsys.readouterr().err
    assert _content(target) == {"diary.txt": b"dear"}
    (target / "diary.txt").unlink()
    assert run_pull(data_dir, "--to", str(target), at=hub) == 0
    assert record(data_dir).path == str(target)


def test_a_pulled_folder_that_broke_is_told(
    hub: FakeHub, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the next pull and by the doctor."""
    assert run_pull(data_dir, at=hub) == 0
    weights = final(data_dir) / "model.safetensors"
    os.truncate(weights, 1000)
    assert run_pull(data_dir, at=hub) == 1
    assert f"delete {final(data_dir)}" in capsys.readouterr().err
    assert main.run(["doctor", "--json", "--data-dir", str(data_dir)]) == 1
    findings = json.loads(capsys.readouterr().out)
    broken = [f["message"] for f in findings if f["check"] == "models"]
    assert len(broken) == 1
    assert str(weights) in broken[0]


def test_without_the_library_it_says_what_to_install(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what works without."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert run_pull(data_dir) == 1
    assert "vlmq[hub]" in capsys.readouterr().err


# --- from folders --------------------------------------------------------------------------------


def cache_of(folder: Path, files: dict[str, bytes]) -> Path:
    """A cache as ``huggingface_hub`` keeps it."""
    root = folder / "models--org--model"
    snapshot = root / "snapshots" / COMMIT
    for part in (root / "blobs", root / "refs", snapshot):
        part.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        (root / "blobs" / digest).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    return root


def test_a_plain_folder_is_linked_file_by_file(data_dir: Path, tmp_path: Path) -> None:
    """Hard links where that can be; its revision follows from its content."""
    origin = write_checkpoint(tmp_path / "carried")
    assert run_pull(data_dir, "--from", str(origin)) == 0
    found = record(data_dir)
    assert found.source is not None
    assert found.source.hub is None
    assert found.source.revision.startswith("sha256-")
    path = final(data_dir, found.source.revision)
    assert (path / "model.safetensors").samefile(origin / "model.safetensors")
    assert run_pull(data_dir, "--from", str(origin)) == 0
    assert record(data_dir) == found


def test_a_folder_on_another_disk_is_copied(data_dir: Path, tmp_path: Path) -> None:
    """After a look at the room."""
    disk = tmp_path / "stick"
    disk.mkdir()
    with small_disk(disk, 4):
        origin = write_checkpoint(disk / "carried")
        assert run_pull(data_dir, "--from", str(origin), "--revision", "v1") == 0
        assert _content(final(data_dir, "v1")).keys() == {*_content(origin), MARKER}
        assert not (final(data_dir, "v1") / "config.json").samefile(origin / "config.json")


@pytest.mark.parametrize(
    "below", ["", "models--org--model", f"models--org--model/snapshots/{COMMIT}"]
)
def test_a_cache_is_read_by_its_references(data_dir: Path, tmp_path: Path, below: str) -> None:
    """Its root, the model's folder, or the revision's; the commit is recorded."""
    files = _content(write_checkpoint(tmp_path / "origin"))
    cache_of(tmp_path / "cache", files)
    assert run_pull(data_dir, "--from", str(tmp_path / "cache" / below)) == 0
    assert record(data_dir).source == ModelSource(None, REPO, COMMIT)
    pulled = _content(final(data_dir))
    del pulled[MARKER]
    assert pulled == files
    assert not any(path.is_symlink() for path in final(data_dir).iterdir())


def test_a_blob_that_is_not_what_its_name_says_is_refused(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache carries the digests of its files."""
    root = cache_of(tmp_path / "cache", _content(write_checkpoint(tmp_path / "origin")))
    weights = (root / "snapshots" / COMMIT / "model.safetensors").resolve()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert run_pull(data_dir, "--from", str(root)) == 1
    assert "model.safetensors arrived with other bytes" in capsys.readouterr().err
    assert nothing_linked(data_dir)


def test_a_link_that_leads_out_of_the_folder_is_refused(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Be it to a file of somebody else's; and a revision that leads out, too."""
    origin = write_checkpoint(tmp_path / "carried")
    (tmp_path / "secret").write_text("{}")
    (origin / "extra.json").symlink_to(tmp_path / "secret")
    assert run_pull(data_dir, "--from", str(origin)) == 1
    assert "leads out of" in capsys.readouterr().err
    root = cache_of(tmp_path / "cache", {})
    assert run_pull(data_dir, "--from", str(root), "--revision", "../../x") == 1
    assert "no revision" in capsys.readouterr().err
    assert nothing_linked(data_dir)


def test_a_broken_folder_is_not_linked(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same checks as for what comes from a hub."""
    origin = write_checkpoint(tmp_path / "carried")
    os.truncate(origin / "model.safetensors", 20)
    assert run_pull(data_dir, "--from", str(origin)) == 1
    assert "damaged or cut short" in capsys.readouterr().err
    assert run_pull(data_dir, "--from", str(cache_of(tmp_path / "c", {})), "--revision", "v2") == 1
    assert f"it has {COMMIT}" in capsys.readouterr().err
    assert ModelRegistry(Layout(data_dir)).list() == []
