"""What ``/metrics`` says, read by Prometheus's own library."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

Series = tuple[str, tuple[tuple[str, str], ...]]


class Scrape:
    """One answer: values by sample name and labels."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = list(text_string_to_metric_families(text))
        samples = [sample for family in self.families for sample in family.samples]
        self.values: dict[Series, float] = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples
        }
        repeated = [series for series, count in Counter(map(_series, samples)).items() if count > 1]
        assert repeated == [], "the same series twice, which Prometheus refuses"

    def value(self, name: str, **labels: str) -> float:
        """The value of one series, which must be there."""
        return self.values[name, tuple(sorted(labels.items()))]

    def by(self, name: str, label: str) -> dict[str, float]:
        """The values of a sample by one of its labels."""
        return {
            dict(labels)[label]: value for (n, labels), value in self.values.items() if n == name
        }


def _series(sample: Any) -> Series:
    return sample.name, tuple(sorted(sample.labels.items()))


def scrape(port: int, key: str | None = None) -> Scrape:
    """Ask a server on this machine, as Prometheus would."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", headers=headers, timeout=20)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Scrape(answer.text)
