"""The system as Prometheus families: nothing is remembered here, so all API processes agree."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from shared import metrics
from shared.gauges import Gauges, LaneGauges
from shared.log import get_logger
from shared.metrics import counted, histogram
from shared.presence import NodeReport
from shared.settings import Settings

_log = get_logger(__name__)
Samples = Mapping[tuple[str, ...], float]


def render(gauges: Gauges, settings: Settings) -> bytes:
    """Everything in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(families(gauges, settings)))
    return generate_latest(registry)


class _Once(Collector):
    """The library asks collectors; this one has been asked already."""

    def __init__(self, found: Iterable[Metric]) -> None:
        self._found = found

    def collect(self) -> Iterable[Metric]:
        return self._found


def families(gauges: Gauges, settings: Settings) -> Iterator[Metric]:
    """One family for each metric of the table that has something to show."""
    values: dict[metrics.Metric, Samples] = {
        **_of_batches(gauges),
        **_of_chats(gauges),
        **_of_finetunes(gauges),
        **_of_nodes(gauges.nodes),
        **_of_storage(settings),
        metrics.BUILD: {(version("vlmq"),): 1},
    }
    for metric in metrics.METRICS:
        if metric.kind == "histogram":
            yield _histogram(metric, gauges)
        elif metric in values:
            yield _family(metric, {**_zeros(metric, gauges), **values[metric]})
        else:
            yield _family(metric, {**_zeros(metric, gauges), **counted(gauges.counters, metric)})


def _of_batches(gauges: Gauges) -> dict[metrics.Metric, Samples]:
    lanes: dict[str, LaneGauges] = gauges.lanes
    return {
        metrics.CHUNKS_WAITING: {(model,): lane.waiting for model, lane in lanes.items()},
        metrics.CHUNKS_HELD: {(model,): lane.held for model, lane in lanes.items()},
        metrics.OLDEST_AGE: {(model,): lane.oldest_age_s for model, lane in lanes.items()},
        metrics.LONGEST_WAIT: {(model,): lane.longest_wait_s for model, lane in lanes.items()},
        metrics.CONTROL_WAITING: {(): gauges.control.waiting},
        metrics.CONTROL_LONGEST_WAIT: {(): gauges.control.longest_wait_s},
        metrics.BATCHES: {(state,): number for state, number in gauges.batches.items()},
        metrics.LEASES_HELD: {(): gauges.leases_held},
    }


def _of_chats(gauges: Gauges) -> dict[metrics.Metric, Samples]:
    return {
        metrics.CHATS_OPEN: {(): gauges.chats_open},
        metrics.CHATS_WAITING: {(model,): count for model, count in gauges.chats_waiting.items()},
    }


def _of_finetunes(gauges: Gauges) -> dict[metrics.Metric, Samples]:
    reports = [(node.node, node.finetune) for node in gauges.nodes if node.finetune is not None]
    gpus: dict[tuple[str, ...], float] = {}
    for node, report in reports:
        gpus[node, "free"] = report.gpus_free
        gpus[node, "taken"] = report.gpus_total - report.gpus_free
    return {
        metrics.FINETUNES: {(state,): number for state, number in gauges.finetunes.items()},
        metrics.FINETUNE_STEP: {(model,): s for model, s in gauges.finetune_step_s.items()},
        metrics.FINETUNE_GPUS: gpus,
    }


def _of_nodes(nodes: list[NodeReport]) -> dict[metrics.Metric, Samples]:
    states = metrics.REPLICAS.known["state"]
    replicas = [(node.node, replica) for node in nodes for replica in node.replicas]
    by_state: dict[tuple[str, ...], float] = {
        (node, replica.model, state): 0 for node, replica in replicas for state in states
    }
    for node, replica in replicas:
        by_state[node, replica.model, replica.state] += 1
    gpus = [((node.node, str(gpu.index)), gpu) for node in nodes for gpu in node.gpus]
    return {
        metrics.NODES: {(): len(nodes)},
        metrics.PROGRAM_READY: {
            (node.node, program): float(state == "ready")
            for node in nodes
            for program, state in node.programs.items()
        },
        metrics.REPLICAS: by_state,
        metrics.REPLICA_RESTARTS: {
            (node, replica.model, str(replica.replica)): replica.restarts
            for node, replica in replicas
        },
        metrics.GPU_MEMORY_USED: {labels: gpu.memory_used_bytes for labels, gpu in gpus},
        metrics.GPU_MEMORY_TOTAL: {labels: gpu.memory_total_bytes for labels, gpu in gpus},
        metrics.GPU_UTILISATION: {
            labels: gpu.utilisation for labels, gpu in gpus if gpu.utilisation is not None
        },
    }


def _of_storage(settings: Settings) -> dict[metrics.Metric, Samples]:
    found: dict[metrics.Metric, Samples] = {
        metrics.STORAGE_MIN_FREE: {(): settings.storage.min_free_bytes},
        metrics.STORAGE_FREE: {},
        metrics.STORAGE_TOTAL: {},
    }
    room = _room(settings.data_dir)
    if room is not None:
        total, free = room
        found[metrics.STORAGE_FREE] = {(): free}
        found[metrics.STORAGE_TOTAL] = {(): total}
    return found


def _room(folder: Path) -> tuple[int, int] | None:
    """Total and free bytes; None, and no series, where the storage does not answer."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        _log.warning("storage_not_measured", folder=str(folder), reason=error.strerror)
        return None
    return usage.total, usage.free


def _zeros(metric: metrics.Metric, gauges: Gauges) -> dict[tuple[str, ...], float]:
    """Nought for every series that may come, so that the first event is seen as an increase."""
    ranges = {"model": tuple(gauges.lanes), **metric.known}
    if metric.kind != "counter" or not set(metric.labels) <= set(ranges):
        return {}
    return dict.fromkeys(itertools.product(*(ranges[label] for label in metric.labels)), 0.0)


def _family(metric: metrics.Metric, samples: Samples) -> Metric:
    family: CounterMetricFamily | GaugeMetricFamily
    if metric.kind == "counter":
        family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
    else:
        family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in samples.items():
        family.add_metric(labels, value)
    return family


def _histogram(metric: metrics.Metric, gauges: Gauges) -> Metric:
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    for model in gauges.lanes:
        found = histogram(gauges.counters, metric, model)
        family.add_metric((model,), found.buckets, found.sum_s)
    return family
