"""``/metrics``: the state of the whole system for Prometheus. See docs/metrics.md."""

from __future__ import annotations

from flask import Blueprint, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from api import current
from api.bodies import require_no_query
from api.metrics import render

blueprint = Blueprint("metrics", __name__)


@blueprint.get("/metrics")
def scrape() -> Response:
    """All metrics; 503 if Redis, where they are, does not answer. Who may ask: api/auth.py."""
    require_no_query()
    stores = current.stores()
    body = render(stores.gauges.read(), stores.settings)
    return Response(body, content_type=CONTENT_TYPE_PLAIN_0_0_4)
