"""What the command line says of a batch: its rate, why lines failed, what the quality gate found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cli.client import Json
from cli.finetune_display import duration
from cli.output import amount

SHOWN = 100
"""Characters of a caption in a list."""


def pace(found: Json) -> str:
    """How fast it goes and how long it will take, e.g. ``81.3 images/s, 2h 05m left``."""
    progress = _extra(found, "progress") or {}
    rate, left_s = progress.get("items_per_second"), progress.get("seconds_left")
    parts = [] if rate is None else [f"{rate:,.1f} {_items(found)}/s"]
    if left_s is not None:
        parts.append(f"{duration(left_s)} left")
    return ", ".join(parts)


def findings(found: Json) -> Iterable[str]:
    """Why lines failed and captions are to be reviewed, a line each, the most frequent first."""
    failures = _extra(found, "failures")
    if failures:
        yield f"failed: {_listed(failures)}"
    quality = _extra(found, "quality")
    if not quality:
        return
    if quality["resampled"]["captions"]:
        yield f"asked again: {_gated(quality['resampled'])}"
    if quality["review"]["captions"]:
        yield f"to review: {_gated(quality['review'])}"
        yield f"see them: vlmq batch review {found['id']}"


def forecast(found: Json) -> Iterable[str]:
    """What the whole set would come to, by the batch of its sample."""
    seen = _extra(found, "preflight")
    if seen is None:
        return
    more = "" if seen["complete"] else " or more; the set was not looked through to its end"
    yield f"images:      {seen['images']:,}{more}"
    yield f"sample:      {seen['sampled']:,} images, {_share(seen['bad_share'])} of them bad"
    if seen["images_per_second"]:
        yield f"rate:        {seen['images_per_second']:,.1f} images/s"
        yield f"time:        {duration(seen['seconds'])}"
    if seen["output_bytes"]:
        yield f"output:      {amount(seen['output_bytes'])}"


def made_by(provenance: Iterable[Json]) -> Iterable[str]:
    """What a caption job's lines came of, a line per difference."""
    for entry in provenance:
        checkpoint = entry.get("fingerprint")
        seed = entry["parameters"].get("seed")
        parts = (
            f"{entry['model']} (revision {entry['model_revision']}"
            + (f", checkpoint {checkpoint[:12]})" if checkpoint else ")"),
            f"prompt {entry['prompt_sha256'][:12]}",
            "no seed" if seed is None else f"seed {seed}",
            f"vlmq {entry['versions'].get('vlmq', '?')}",
        )
        yield f"made by: {', '.join(parts)}"


def short(text: str) -> str:
    """A caption on one line of a terminal."""
    joined = " ".join(text.split())
    return joined if len(joined) <= SHOWN else f"{joined[:SHOWN]}…"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def is_caption_job(found: Json) -> bool:
    """Whether it is a batch of an image set."""
    return _extra(found, "captions") is not None


def _items(found: Json) -> str:
    return "images" if is_caption_job(found) else "items"


def _gated(counts: Json) -> str:
    return f"{counts['captions']:,} ({_listed(counts['reasons'])})"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {by:,}" for name, by in counts.items())


def _extra(found: Json, name: str) -> Any:
    return (found.get("vlmq") or {}).get(name)
