"""Counts by reason, as shards, Redis and records carry them: one flat name for each.

``failed:CODE`` counts lines that failed, ``review:REASON`` captions that did not pass the quality
gate, ``resampled:REASON`` those that were thrown away and asked for again. A caption with two
reasons counts under both; ``captions:review`` and ``captions:resampled`` count each once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from shared.quality import Verdict

FAILED = "failed"
REVIEW = "review"
RESAMPLED = "resampled"
CAPTIONS = "captions"


def count_verdict(counts: Counter[str], verdict: Verdict) -> None:
    """Count what the quality gate found in one caption."""
    if verdict.reasons:
        counts[f"{CAPTIONS}:{REVIEW}"] += 1
        counts.update(f"{REVIEW}:{reason}" for reason in verdict.reasons)
    if verdict.resampled:
        counts[f"{CAPTIONS}:{RESAMPLED}"] += 1
        counts.update(
            f"{RESAMPLED}:{reason}" for reasons in verdict.resampled for reason in reasons
        )


def of_kind(counts: Mapping[str, int], kind: str) -> dict[str, int]:
    """The counts of one kind by name, the largest first."""
    start = f"{kind}:"
    found = {name[len(start) :]: by for name, by in counts.items() if by and name.startswith(start)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def total(all_counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of several."""
    found: Counter[str] = Counter()
    for counts in all_counts:
        found.update(counts)
    return dict(found)
