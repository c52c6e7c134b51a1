"""What Prometheus is told to read and Grafana to show exists under these names."""

import re
from pathlib import Path

import yaml
from ray.util.metrics import Metric

from infra.grafana.__main__ import dashboard
from infra.kuberay.examples.__main__ import FOLDER
from orchestration.config import load
from orchestration.prometheus import _COUNTERS, _GAUGES, Prometheus
from orchestration.serving.metrics import EngineMetrics
from tests.infra.schemas import pod_templates

SCRAPE = Path(__file__).resolve().parents[2] / "infra" / "prometheus" / "scrape.yaml"


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]


def names(prefix: str) -> set[str]:
    """Of all metrics that the dashboard asks for, those with the prefix."""
    return {name for text in expressions() for name in re.findall(rf"\b{prefix}\w*", text)}


def test_every_figure_of_training_that_is_shown_is_one_that_a_run_has():
    run = Prometheus(load("pydocs-tiny"), 0)
    for kind in ("train", "evaluation", "checkpoint", "start"):
        figures = [figure for of, figure in (*_GAUGES, *_COUNTERS) if of == kind]
        run.log({"kind": kind, "bits_by_time": [1.0], "step": 1} | dict.fromkeys(figures, 1.0))
    told = {sample.name for family in run.collect() for sample in family.samples}
    run.close()
    assert len(names("md4_")) > 12
    assert names("md4_") <= told


def test_every_figure_of_the_service_that_is_shown_is_one_that_an_engine_has(monkeypatch):
    made: dict[str, str] = {}
    original = Metric.__init__

    def note(self, name, *args, **kwargs):
        original(self, name, *args, **kwargs)
        made[name] = type(self).__name__

    monkeypatch.setattr(Metric, "__init__", note)
    EngineMetrics("model")
    exported = {f"ray_{name}{'_bucket' if kind == 'Histogram' else ''}" for name, kind in made.items()}
    shown = names("ray_md4_serving_")
    assert len(shown) > 15
    assert shown <= exported


def test_the_dashboard_is_one_that_grafana_takes():
    board = dashboard()
    assert [panel["id"] for panel in board["panels"]] == list(range(1, len(board["panels"]) + 1))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for text in expressions():
        assert text.count("(") == text.count(")"), text
        assert text.count("{") == text.count("}"), text


def test_the_ports_that_are_read_are_the_pods_own():
    [job] = yaml.safe_load(SCRAPE.read_text())
    rules = {tuple(rule["source_labels"]): rule for rule in job["relabel_configs"]}
    ports = rules["__meta_kubernetes_pod_container_port_name",]["regex"].split("|")
    documents = list(yaml.safe_load_all((FOLDER / "multi-node.yaml").read_text()))
    templates = [template for document in documents for template in pod_templates(document)]
    offered = {
        port["name"]
        for template in templates
        for container in template["spec"]["containers"]
        for port in container.get("ports", [])
    }
    assert set(ports) <= offered
    assert rules["__meta_kubernetes_pod_label_app_kubernetes_io_name",]["regex"] == "md4"
    assert all(template["metadata"]["labels"]["app.kubernetes.io/name"] == "md4" for template in templates)
