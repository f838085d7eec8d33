"""``make demo``: pictures in over HTTP, captions out, with nothing but this machine's processor.

Starts ``vlmq up`` in a folder of its own, captions one picture by streamed chat and 200 pictures
by batch, both with the unmodified ``openai`` SDK, and compares every caption with the truth. The
pictures are scenes that the bundled tiny model was not trained on. Then it captions them once more
as a folder and as a tar; and a model that has learned nothing is fine-tuned to do the same, and asked
about the same pictures.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import httpx
import openai

from cli import demo_captions, demo_finetune
from shared.process import free_port

MODEL = "tiny-internvl2"
SCENES = 200
SHOWN = 5
REQUIRED_SHARE = 0.95
ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
START_LIMIT_S = 120
BATCH_LIMIT_S = 600


@dataclass(frozen=True)
class Picture:
    """An image file and the caption that is right for it."""

    path: Path
    caption: str

    @property
    def data_url(self) -> str:
        """The whole file as a ``data:`` URL."""
        kind = "png" if self.path.suffix == ".png" else "jpeg"
        body = base64.b64encode(self.path.read_bytes()).decode()
        return f"data:image/{kind};base64,{body}"

    def messages(self, prompt: str) -> list[dict[str, object]]:
        """The conversation that asks about it."""
        return [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": self.data_url}},
                    {"type": "text", "text": prompt},
                ],
            }
        ]


def main() -> int:
    """Run the demo; the exit status says whether the captions were right."""
    folder = Path(tempfile.mkdtemp(prefix="vlmq-demo-"))
    try:
        pictures = draw(folder / "pictures")
        with server(folder) as base_url:
            sdk = openai.OpenAI(base_url=base_url, api_key="none needed on loopback")
            chat(sdk, pictures[0])
            shares = {MODEL: batch(sdk, pictures)}
            right = {picture.path.name: picture.caption for picture in pictures}
            sets = demo_captions.image_sets(base_url, MODEL, folder / "pictures", right)
            shares["the same, as a folder and as a tar"] = sets
            shares.update(tune(sdk, folder, pictures))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    click.echo()
    for model, share in shares.items():
        click.echo(f"{share:6.1%} of the captions are exactly right: {model}")
    trained = [share for model, share in shares.items() if model != demo_finetune.BASE]
    if min(trained) < REQUIRED_SHARE:
        click.echo(f"At least {REQUIRED_SHARE:.0%} were expected of the trained ones.")
        return 1
    click.echo("Next: .venv/bin/vlmq up, and the README.")
    return 0


def draw(folder: Path) -> list[Picture]:
    """Make the pictures."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "workers.inference.tiny.scenes",
            str(folder),
            "--count",
            str(SCENES),
            "--split",
            "held_out",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    click.echo(f"{len(rows)} pictures of two shapes, JPEG and PNG, that the model never saw")
    return [Picture(folder / row["image"], row["caption"]) for row in rows]


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """``vlmq up`` in ``folder``, stopped at the end; gives the base URL for an SDK."""
    port = free_port()
    command = [sys.executable, "-m", "cli.main", "up", "--port", str(port)]
    click.echo(f"\n$ vlmq up --port {port}")
    roots = json.dumps([str(folder / "pictures")])
    environment = {**os.environ, "VLMQ_IMAGES__ROOTS": roots}
    process = subprocess.Popen([*command, "--data-dir", str(folder / "data")], env=environment)
    try:
        wait_until_ready(process, port)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=90)


def wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when the server and the model answer."""
    deadline = time.monotonic() + START_LIMIT_S
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Are you there?"}],
        "max_tokens": 1,
    }
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise click.ClickException(f"vlmq up exited with status {process.returncode}")
        try:
            answer = httpx.post(f"http://127.0.0.1:{port}{ENDPOINT}", json=body, timeout=30)
            if answer.status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise click.ClickException(f"vlmq up was not ready after {START_LIMIT_S} s")


def chat(sdk: openai.OpenAI, picture: Picture) -> None:
    """Ask about one picture and show the answer as it comes."""
    click.echo(f"\nPOST {ENDPOINT} (streamed): {picture.path.name}, {picture.caption!r}")
    click.echo("  ", nl=False)
    messages: Any = picture.messages("Describe the image.")
    stream: Any = sdk.chat.completions.create(
        model=MODEL, messages=messages, stream=True, temperature=0
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            click.echo(chunk.choices[0].delta.content, nl=False)
    click.echo()


def batch(
    sdk: openai.OpenAI, pictures: list[Picture], model: str = MODEL, shown: int = SHOWN
) -> float:
    """Caption all pictures in one batch; returns the share of exact captions."""
    click.echo(f"\nPOST /v1/batches: {len(pictures)} pictures, {model}")
    started = time.monotonic()
    lines = [request_line(number, picture, model) for number, picture in enumerate(pictures)]
    uploaded = sdk.files.create(file=("pictures.jsonl", "".join(lines).encode()), purpose="batch")
    job = sdk.batches.create(input_file_id=uploaded.id, endpoint=ENDPOINT, completion_window="24h")
    while job.status in ("validating", "in_progress", "finalizing"):
        if time.monotonic() - started > BATCH_LIMIT_S:
            raise click.ClickException(f"the batch took longer than {BATCH_LIMIT_S} s: {job}")
        time.sleep(0.25)
        job = sdk.batches.retrieve(job.id)
    if job.status != "completed" or job.output_file_id is None:
        raise click.ClickException(f"the batch ended as {job.status}: {job}")
    seconds = time.monotonic() - started
    click.echo(f"  {job.status} in {seconds:.1f} s ({len(pictures) / seconds:.0f} pictures/s)")
    return compare(sdk.files.content(job.output_file_id).text, pictures, shown)


def tune(sdk: openai.OpenAI, folder: Path, pictures: list[Picture]) -> dict[str, float]:
    """Fine-tune a model that knows nothing; returns the shares of exact captions by model."""
    demo_finetune.link_untrained(folder, folder / "data")
    shares = {demo_finetune.BASE: batch(sdk, pictures, demo_finetune.BASE, shown=2)}
    job = demo_finetune.finetune(sdk, folder)
    demo_finetune.show_comparison(sdk, job, SHOWN)
    assert job.fine_tuned_model is not None
    return {
        **shares,
        job.fine_tuned_model: batch(sdk, pictures, job.fine_tuned_model),
    }


def request_line(number: int, picture: Picture, model: str) -> str:
    """One line of the batch's input."""
    body = {
        "model": model,
        "messages": picture.messages("Describe the image."),
        "temperature": 0,
        "max_tokens": 32,
    }
    request = {"custom_id": str(number), "method": "POST", "url": ENDPOINT, "body": body}
    return json.dumps(request) + "\n"


def compare(output: str, pictures: list[Picture], shown: int) -> float:
    """Print some captions and what was expected; returns the share that is exactly right."""
    right = 0
    for row in map(json.loads, output.splitlines()):
        picture = pictures[int(row["custom_id"])]
        answer = row["response"]["body"]["choices"][0]["message"]["content"].strip()
        is_right = answer == picture.caption
        right += is_right
        if int(row["custom_id"]) < shown:
            mark = "ok " if is_right else f"-- expected {picture.caption!r}, got"
            click.echo(f"  {picture.path.name}  {mark} {' '.join(answer.split())[:60]}")
    return right / len(pictures)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except click.ClickException as error:
        error.show()
        sys.exit(1)
