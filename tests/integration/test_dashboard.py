"""The dashboard and the alerts ask only for what a running node really tells."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import promql_parser
import pytest
import yaml

from shared.metrics import METRICS
from shared.presence import FinetuneReport, GpuReport, NodeReport
from tests.running_node import RunningNode, wait_for
from tests.scraped import Scrape, scrape

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "vlmq.json").read_text())
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus-rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
TARGETS = [
    (f"{panel['title']} {target['refId']}", target)
    for panel in PANELS
    for target in panel["targets"]
]
EXPRESSIONS = [
    *((name, target["expr"]) for name, target in TARGETS),
    *((rule["alert"], rule["expr"]) for rule in RULES),
]


@pytest.fixture(scope="module")
def seen(node: RunningNode) -> Scrape:
    """A node's page when a chat had failed, beside a machine that trains on its only GPU."""
    with pytest.raises(openai.APIStatusError):
        node.sdk(max_retries=0).chat.completions.create(
            model="echo", messages=[{"role": "user", "content": "[[echo:error]]"}]
        )
    gpus = [GpuReport(0, 1, 2, 0.5)]
    trains = NodeReport("gpu", int(time.time()), gpus=gpus, finetune=FinetuneReport(1, 0))
    node.stores.presence.announce(trains, ttl_s=60)
    node.stores.redis.hset("vlmq:finetune_steps", "ftjob-elsewhere", '["base", 1.5]')
    wait_for(lambda: "vlmq_chat_errors_total{" in scrape(node.port).text, "the error", 10)
    found = scrape(node.port)
    node.stores.presence.forget("gpu")
    node.stores.redis.delete("vlmq:finetune_steps")
    return found


def labels_of(seen: Scrape, name: str) -> set[str]:
    """The labels of a sample that is on the page."""
    found = [{label for label, _ in labels} for sample, labels in seen.values if sample == name]
    assert found, f"no node tells of {name}"
    return found[0]


def parsed(expression: str) -> Any:
    """What Prometheus gets from Grafana, read."""
    for name in VARIABLES:
        expression = expression.replace(f"${name}", "any")
    return promql_parser.parse(expression.replace("$__rate_interval", "5m"))


def nodes_of(tree: Any, kind: type) -> Iterator[Any]:
    """All parts of a kind."""
    found: list[Any] = []
    promql_parser.walk(tree, lambda part: found.append(part) if isinstance(part, kind) else None)
    yield from found


def selectors(tree: Any) -> list[Any]:
    """Everything that names a metric."""
    ranges = [matrix.vector_selector for matrix in nodes_of(tree, promql_parser.MatrixSelector)]
    return [*nodes_of(tree, promql_parser.VectorSelector), *ranges]


@pytest.mark.parametrize(("name", "expression"), EXPRESSIONS, ids=[name for name, _ in EXPRESSIONS])
def test_an_expression_names_what_is_there(name: str, expression: str, seen: Scrape) -> None:
    """Metrics, labels in braces and their values, labels to aggregate by and to match on."""
    tree = parsed(expression)
    assert selectors(tree)
    for selector in selectors(tree):
        known = labels_of(seen, selector.name)
        for matcher in selector.matchers.matchers:
            assert matcher.name in known, f"{selector.name} has no label {matcher.name}"
            if matcher.op == promql_parser.MatchOp.Equal:
                assert matcher.value in seen.by(selector.name, matcher.name)
    for aggregate in nodes_of(tree, promql_parser.AggregateExpr):
        wanted = set(aggregate.modifier.labels) if aggregate.modifier else set()
        for selector in selectors(aggregate):
            assert wanted <= labels_of(seen, selector.name)
    for binary in nodes_of(tree, promql_parser.BinaryExpr):
        matching = binary.modifier.matching if binary.modifier else None
        for selector in selectors(binary) if matching else []:
            assert set(matching.labels) <= labels_of(seen, selector.name)


@pytest.mark.parametrize(("name", "target"), TARGETS, ids=[name for name, _ in TARGETS])
def test_a_legend_names_labels_of_its_result(
    name: str, target: dict[str, Any], seen: Scrape
) -> None:
    """Or the curves of two models would have the same name."""
    tree = parsed(target["expr"])
    named = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]))
    aggregates = list(nodes_of(tree, promql_parser.AggregateExpr))
    for aggregate in aggregates:
        by = set(aggregate.modifier.labels) if aggregate.modifier else set()
        assert by - {"le"} == named
    if not aggregates:
        for selector in selectors(tree):
            assert labels_of(seen, selector.name) == named


def test_every_variable_is_a_label_that_is_there(seen: Scrape) -> None:
    """And the data source can be chosen."""
    assert VARIABLES["datasource"]["type"] == "datasource"
    for name in VARIABLES.keys() - {"datasource"}:
        found = re.fullmatch(r"label_values\((\w+), (\w+)\)", VARIABLES[name]["query"]["query"])
        assert found is not None
        assert found[2] in labels_of(seen, found[1])
    sources = {json.dumps(panel["datasource"], sort_keys=True) for panel in PANELS}
    assert sources == {'{"type": "prometheus", "uid": "${datasource}"}'}


def test_every_metric_is_on_the_dashboard() -> None:
    """What nobody looks at need not be counted; a few are for alerts and for the curious."""
    asked = {
        selector.name.removesuffix("_bucket")
        for _, expression in EXPRESSIONS
        for selector in selectors(parsed(expression))
    }
    unused = {metric.name for metric in METRICS} - asked
    assert unused == {"vlmq_batches_created_total", "vlmq_batch_control_waiting", "vlmq_nodes"}


def test_the_panels_are_laid_out_without_overlap() -> None:
    """Each in a place of its own, with a title, an explanation and a number of its own."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + column, place["y"] + row)
            for column in range(place["w"])
            for row in range(place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["title"] and panel["description"] for panel in PANELS)


def test_an_alert_says_what_is_wrong(seen: Scrape) -> None:
    """In a sentence whose labels the expression leaves."""
    for rule in RULES:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        summary = rule["annotations"]["summary"]
        named = set(re.findall(r"\$labels\.(\w+)", summary))
        tree = parsed(rule["expr"])
        aggregates = list(nodes_of(tree, promql_parser.AggregateExpr))
        for aggregate in aggregates:
            assert named <= (set(aggregate.modifier.labels) if aggregate.modifier else set())
        if not aggregates:
            for selector in selectors(tree):
                assert named <= labels_of(seen, selector.name)
