"""The command line against a running node, as people use it: a process, its output, its status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running_node import RunningNode, running_node, wait_for

ENDPOINT = "/v1/chat/completions"


def vlmq(node: RunningNode, *arguments: str, status: int = 0) -> tuple[str, str]:
    """Run it to its end; returns standard output and standard error."""
    process = node.vlmq(*arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, (out, err)
    return out, err


def lines(folder: Path, texts: list[str]) -> Path:
    """A batch file with one request per text."""
    path = folder / "requests.jsonl"
    with path.open("w") as stream:
        for number, text in enumerate(texts):
            body = {"model": "echo", "messages": [{"role": "user", "content": text}]}
            request = {"custom_id": f"r{number}", "method": "POST", "url": ENDPOINT, "body": body}
            stream.write(json.dumps(request) + "\n")
    return path


def test_a_question_is_answered(node: RunningNode) -> None:
    """``vlmq chat MODEL -m TEXT`` prints the answer alone; with --json, all about it."""
    out, _ = vlmq(node, "chat", "echo", "-m", "two words")
    assert out == "two words\n"
    out, _ = vlmq(node, "chat", "echo", "-m", "two words", "--json")
    answer = json.loads(out)
    assert (answer["content"], answer["finish_reason"]) == ("two words", "stop")
    assert answer["usage"]["completion_tokens"] == 2


def test_a_conversation_goes_on_after_a_mistake(node: RunningNode, tmp_path: Path) -> None:
    """Lines become turns, commands work, an unreadable image is said, /exit leaves."""
    script = "first line\n/image none.png\n/help\nsecond line\n/exit\n"
    # A pseudo-terminal, because without one standard input is a single question.
    main_end, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "chat", "echo"],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "VLMQ_URL": node.base_url},
    )
    os.close(terminal)
    os.write(main_end, script.encode())
    out, err = process.communicate(timeout=60)
    os.close(main_end)
    assert process.returncode == 0
    assert "first line" in out
    assert "second line" in out
    assert "none.png: No such file" in err


def test_an_unknown_model_is_refused_in_words(node: RunningNode) -> None:
    """The server's own message, and exit status 1."""
    _, err = vlmq(node, "chat", "nobody", "-m", "hello", status=1)
    assert "nobody" in err
    assert "Traceback" not in err


def test_a_batch_is_submitted_watched_and_read(node: RunningNode, tmp_path: Path) -> None:
    """Given a file, when submitted with --watch, then every answer can be written to a file."""
    path = lines(tmp_path, [f"text {number}" for number in range(300)])
    out, err = vlmq(node, "batch", "submit", str(path), "--watch", "--json")
    batch = json.loads(out)
    assert batch["status"] == "completed"
    assert "300/300" in err
    output = tmp_path / "answers.jsonl"
    vlmq(node, "batch", "results", batch["id"], "-o", str(output))
    answers = {row["custom_id"]: row for row in map(json.loads, output.open())}
    assert answers.keys() == {f"r{number}" for number in range(300)}
    message = answers["r7"]["response"]["body"]["choices"][0]["message"]
    assert message["content"] == "text 7"
    out, _ = vlmq(node, "batch", "results", batch["id"])
    assert out == output.read_text()
    out, _ = vlmq(node, "batch", "list", "--json")
    assert batch["id"] in [row["id"] for row in json.loads(out)["data"]]
    out, _ = vlmq(node, "batch", "list", "--limit", "100")
    assert batch["id"] in out


def test_failed_requests_are_counted_and_explained(node: RunningNode, tmp_path: Path) -> None:
    """Given one request that fails, then the rest is done and the reason can be written."""
    path = lines(tmp_path, ["fine", "[[echo:error]]"])
    _, err = vlmq(node, "batch", "submit", str(path), "--watch")
    assert "1/2 (1 failed)" in err
    batch_id = err.partition("batch results ")[2].split()[0]
    answers, errors = tmp_path / "answers.jsonl", tmp_path / "errors.jsonl"
    vlmq(node, "batch", "results", batch_id, "-o", str(answers), "--errors", str(errors))
    assert [json.loads(row)["custom_id"] for row in answers.open()] == ["r0"]
    assert [json.loads(row)["custom_id"] for row in errors.open()] == ["r1"]


def test_a_broken_line_is_named_by_its_number(node: RunningNode, tmp_path: Path) -> None:
    """Given JSON that is none in line 2, then line 2 is named and the rest is done."""
    path = lines(tmp_path, ["fine"])
    path.write_text(path.read_text() + "{broken\n")
    _, err = vlmq(node, "batch", "submit", str(path), "--watch")
    assert "line 2 is not valid JSON" in err
    assert "done: 1/2 (1 failed)" in err


def test_a_batch_that_fails_as_a_whole_exits_with_1(node: RunningNode, tmp_path: Path) -> None:
    """Given a file without requests, then watching says why and exits with 1."""
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    _, err = vlmq(node, "batch", "submit", str(path), "--watch", status=1)
    assert "empty_file" in err


def test_ctrl_c_leaves_the_batch_running(node: RunningNode, tmp_path: Path) -> None:
    """Given a watched batch, when Ctrl-C comes, it is said that the batch goes on; then cancel."""
    path = lines(tmp_path, ["[[echo:sleep=20]]"] * 2)
    out, _ = vlmq(node, "batch", "submit", str(path))
    batch_id = out.strip()
    watching = node.vlmq("batch", "watch", batch_id)
    assert watching.stderr is not None
    first = watching.stderr.readline()
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert first.split()[0] in {"validating", "in_progress"}
    assert "goes on without you" in err
    assert node.sdk().batches.retrieve(batch_id).status in {"validating", "in_progress"}
    _, err = vlmq(node, "batch", "results", batch_id, status=1)
    assert f"vlmq batch watch {batch_id}" in err
    out, _ = vlmq(node, "batch", "cancel", batch_id, "--json")
    assert json.loads(out)["status"] in {"cancelling", "cancelled"}


def test_status_and_doctor_see_the_node(node: RunningNode) -> None:
    """Both name every program, for people and as JSON."""
    place = ("--config", str(node.config))
    out, _ = vlmq(node, "status", *place, "--json")
    said = json.loads(out)
    assert said["api"]["ready"] is True
    [here] = said["nodes"]
    assert [replica["model"] for replica in here["replicas"]] == ["echo"]
    out, _ = vlmq(node, "status", *place)
    assert "echo/0" in out
    wait_for(lambda: "everything is ready" in vlmq(node, "doctor", *place)[0], "a healthy node", 30)
    out, _ = vlmq(node, "doctor", *place, "--rebuild", "--json")
    assert set(json.loads(out)) >= {"files", "batches"}


@pytest.mark.timeout(180)
def test_watching_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    """Given a watched batch, when the API is killed, then watching goes on to the end."""
    with running_node() as own:
        path = lines(tmp_path, ["[[echo:sleep=6]]"] * 2)
        watching = own.vlmq("batch", "submit", str(path), "--watch")
        assert watching.stderr is not None
        while not watching.stderr.readline().startswith("in_progress"):
            assert watching.poll() is None
        for pid in own.pids("api.server"):
            os.kill(pid, signal.SIGKILL)
        out, err = watching.communicate(timeout=60)
        assert watching.returncode == 0, (out, err)
        assert "trying again until it answers" in err
        assert "the server answers again" in err
        assert "done: 2/2" in err


@pytest.mark.timeout(180)
def test_up_serves_echo_without_any_configuration(tmp_path: Path) -> None:
    """``vlmq up --engine echo`` is enough, and SIGTERM ends it with status 0."""
    command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(tmp_path / "d")]
    up = subprocess.Popen(
        [*command, "--engine", "echo", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert up.stdout is not None
        story = ""
        while "everything is up" not in story:
            line = up.stdout.readline()
            assert line, story
            story += line
        url = story.partition("API on ")[2].split()[0]
        asked = subprocess.run(
            [sys.executable, "-m", "cli.main", "chat", "echo", "-m", "hi", "--url", url],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (asked.stdout, asked.returncode) == ("hi\n", 0), asked.stderr
        up.send_signal(signal.SIGTERM)
        rest, _ = up.communicate(timeout=60)
        assert up.returncode == 0
        assert rest.endswith("stopped\n")
    finally:
        if up.poll() is None:
            up.kill()
            up.communicate()
