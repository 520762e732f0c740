"""The dashboard asks for what /metrics really gives, and shows all of it; so does docs/metrics.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Served

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "tools" / "grafana" / "tokenspeed.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
UNSHOWN = {"request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens"}
"""Families without a panel."""


@pytest.fixture
def given(served: Served) -> dict[str, set[str]]:
    """Labels of every sample, by name."""
    assert served.client.post("/v1/completions", json={"prompt": "ab"}).status_code == 200
    text = served.client.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def names(query: str) -> list[str]:
    return re.findall(r"tokenspeed:\w+", query)


def test_every_name_and_label_is_there(given: dict[str, set[str]]) -> None:
    assert len(QUERIES) > len(DASHBOARD["panels"])
    for query in QUERIES:
        assert names(query), query
        for name in names(query):
            assert name in given, query
            asked = set(re.findall(r"(\w+)=~?\"", query)) | set(re.findall(r"by \((\w+)\)", query))
            assert asked <= given[name], query
    (variable,) = (found["query"] for found in DASHBOARD["templating"]["list"] if found["name"] == "model")
    assert all("model_name" in given[name] for name in names(variable))


def test_counters_and_histograms_are_asked_for_as_rates() -> None:
    for query in QUERIES:
        for name in re.findall(r"tokenspeed:\w+(?:_total|_bucket)", query):
            assert re.search(rf"(rate|increase)\({name}", query), query


def test_every_family_has_a_panel(given: dict[str, set[str]]) -> None:
    shown = {name.removesuffix("_bucket") for query in QUERIES for name in names(query)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in given}
    assert families - shown == {f"tokenspeed:{name}" for name in UNSHOWN}


def test_panels_do_not_overlap() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_the_page_has_a_row_for_every_family_and_no_other(served: Served) -> None:
    text = served.client.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE tokenspeed:(\w+) (\w+)$", text, re.MULTILINE))
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert dict(rows) == kinds
    assert len(rows) == len(kinds)
