"""The demo's image sets: a folder of pictures and a tar of the same, captioned by one request each."""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import httpx
import openai

PROMPT = "Describe the image."
LIMIT_S = 300
POLL_S = 0.25


def image_sets(base_url: str, model: str, folder: Path, right: Mapping[str, str]) -> float:
    """Caption both; returns the smaller share of captions that are as ``right`` says, by file name."""
    archive = folder / "pictures.tar"
    with tarfile.open(archive, "w") as tar:
        for name in sorted(right):
            tar.add(folder / name, arcname=name)
    return min(_captioned(base_url, model, str(place), right) for place in (folder, archive))


def _captioned(base_url: str, model: str, place: str, right: Mapping[str, str]) -> float:
    click.echo(f"\nPOST /v1/captions: {Path(place).name}, {model}")
    began = time.monotonic()
    body = {
        "model": model,
        "images": place,
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": 32,
    }
    answer = httpx.post(f"{base_url}/captions", json=body, timeout=60)
    if answer.status_code != httpx.codes.OK:
        raise click.ClickException(f"the image set was refused: {answer.text}")
    sdk = openai.OpenAI(base_url=base_url, api_key="none needed on loopback")
    job = sdk.batches.retrieve(answer.json()["id"])
    while job.status in ("validating", "in_progress", "finalizing"):
        if time.monotonic() - began > LIMIT_S:
            raise click.ClickException(f"the image set took longer than {LIMIT_S} s: {job}")
        time.sleep(POLL_S)
        job = sdk.batches.retrieve(job.id)
    if job.status != "completed" or job.output_file_id is None:
        raise click.ClickException(f"the image set ended as {job.status}: {job}")
    seconds = time.monotonic() - began
    rows = [json.loads(line) for line in sdk.files.content(job.output_file_id).text.splitlines()]
    exact = sum(_answer(row) == right[Path(row["custom_id"]).name] for row in rows)
    rate = len(rows) / seconds
    click.echo(f"  {len(rows)} captions in {seconds:.1f} s ({rate:.0f}/s), {exact} exactly right")
    return exact / len(right)


def _answer(row: Mapping[str, Any]) -> str:
    text: str = row["response"]["body"]["choices"][0]["message"]["content"]
    return text.strip()
