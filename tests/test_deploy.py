"""What is deployed: the Containerfile and the manifests, against Kubernetes' own schemas and against the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from netweight.cli import app
from netweight.serve import server
from netweight.serve.app import application
from netweight.serve.body import MOST_HELD
from netweight.serve.hosted import Models
from netweight.serve.keys import OPEN
from netweight.serve.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
VERSION = "1.35"  # the first in which image volumes are stable
FOREIGN = {"PodMonitor", "Kustomization"}  # of other projects: Kubernetes has no schema of theirs


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for found in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield path.name, found


def one(kind: str) -> Any:
    (found,) = (document for _, document in documents() if document["kind"] == kind)
    return found


@pytest.fixture
def pod() -> Any:
    return one("Deployment")["spec"]["template"]["spec"]


@pytest.fixture
def container(pod: Any) -> Any:
    (found,) = pod["containers"]
    return found


def options() -> set[str]:
    """Of `netweight serve`."""
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {word for parameter in command.params for word in parameter.opts}


def test_manifests_are_what_kubernetes_knows() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for name, document in documents():
        if document["kind"] not in FOREIGN:
            assert validate.validate(document, VERSION, strict=True) == VERSION, name


def test_the_list_of_manifests_is_whole() -> None:
    apart = {"kustomization.yaml", "monitor.yaml", "adapter.yaml"}
    assert set(one("Kustomization")["resources"]) | apart == {name for name, _ in documents()}


def test_probes_ask_what_exists(container: Any) -> None:
    routes = {route.path for route in application(Models(1), Metrics()).routes}  # type: ignore[attr-defined]
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"}
    assert set(paths.values()) <= routes & OPEN, "they bring no key"
    (port,) = container["ports"]
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in paths} == {port["name"]}
    assert container["args"][container["args"].index("--port") + 1] == str(port["containerPort"])
    (served,) = one("Service")["spec"]["ports"]
    assert served["targetPort"] == port["name"]
    monitor = one("PodMonitor")["spec"]["podMetricsEndpoints"][0]
    assert monitor["port"] == port["name"]
    assert monitor["path"] in routes - OPEN, "so it brings a key"
    assert monitor["authorization"]["credentials"]


def test_selectors_meet_the_pods() -> None:
    labels = one("Deployment")["spec"]["template"]["metadata"]["labels"]
    wanted = [
        one(kind)["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor")
    ]
    wanted += [one("Service")["spec"]["selector"], one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]]
    assert all(want == labels for want in wanted)
    target = one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", one("Deployment")["metadata"]["name"])
    assert "replicas" not in one("Deployment")["spec"], "they would fight over it"


def test_pods_may_do_nothing_but_serve(pod: Any, container: Any) -> None:
    whole, inner = pod["securityContext"], container["securityContext"]
    assert whole["runAsNonRoot"] is True
    assert whole["runAsUser"] > 0
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inner["allowPrivilegeEscalation"] is False
    assert inner["readOnlyRootFilesystem"] is True
    assert inner["capabilities"] == {"drop": ["ALL"]}
    assert "privileged" not in inner
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert all(mount["readOnly"] for mount in container["volumeMounts"])
    assert not any("hostPath" in volume for volume in pod["volumes"])
    policy = one("NetworkPolicy")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == []
    for rule in policy["ingress"]:
        assert rule["from"]
        assert rule["ports"]


def test_pods_end_and_fit(pod: Any, container: Any) -> None:
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > server._DRAIN + pause
    limits = container["resources"]["limits"]
    assert int(limits["memory"].removesuffix("Gi")) * 2**30 > 2 * MOST_HELD
    threads = container["args"][container["args"].index("--threads") + 1]
    assert limits["cpu"] == container["resources"]["requests"]["cpu"] == threads
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert Path(container["args"][0]).parent == Path(mounts["model"]), "a mount point could not be replaced"
    assert container["args"][container["args"].index("--keys") + 1].startswith(mounts["keys"] + "/")
    assert not any("subPath" in mount for mount in container["volumeMounts"]), "changes of keys would not be seen"
    assert {word for word in container["args"] if word.startswith("--")} <= options()
    assert not re.search(r"(:latest|^[^:]+)$", container["image"])


def test_what_is_mounted_lies_around_the_artifact() -> None:
    for page in (DEPLOY / "Containerfile", DEPLOY.parent / "docs" / "deploy.md"):
        (command,) = re.findall(r"podman run (?:.*\\\n)?.*", page.read_text(encoding="utf-8"))
        (mount,) = re.findall(r"-v \S+?:(\S+?):ro ", command)
        (folder,) = re.findall(r" (/\S+\.nw) ", command)
        assert Path(folder).parent == Path(mount), "a mount point could not be replaced"
        assert set(re.findall(r"--[a-z-]+", command.partition(folder)[2])) <= options()


def test_the_autoscaler_asks_for_a_metric_that_is_shown(shop: Any) -> None:
    metrics = Metrics()
    models = Models(1)
    models.load(shop.folder, "shop")
    metrics.watch(models)
    shown = metrics.text().decode()
    name = next(m["pods"]["metric"]["name"] for m in one("HorizontalPodAutoscaler")["spec"]["metrics"] if "pods" in m)
    assert f'{name}{{model="shop"}} 0.0' in shown
    (rule,) = yaml.safe_load(one("ConfigMap")["data"]["config.yaml"])["rules"]
    assert rule["seriesQuery"].startswith(f"{name}{{")
    assert rule["name"]["as"] == name
    models.close()


# --- the Containerfile ---


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Containerfile").read_text(encoding="utf-8"))
    lines = (line.strip() for line in text.splitlines())
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line and line[0] != "#")]


def test_the_containerfile_holds_to_its_rules() -> None:
    found = instructions()
    starts = [i for i, (word, _) in enumerate(found) if word == "FROM"]
    assert len(starts) == 2, "what builds is not what runs"
    arguments = dict(rest.split("=", 1) for word, rest in found if word == "ARG")
    for i in starts:
        image = found[i][1].split()[0]
        image = arguments.get(image.strip("${}"), image)
        assert re.search(r":\d", image), f"{image} has no version"
    assert not [rest for word, rest in found if word == "ADD"], "COPY says where things come from"
    assert not [rest for _, rest in found if re.search(r"curl|wget|https?://(?!127\.0\.0\.1)", rest)]
    last = found[starts[-1] :]
    words = [word for word, _ in last]
    assert not [rest for word, rest in last if word == "RUN" and "install" in rest.replace("uninstall", "")]
    (user,) = [rest for word, rest in last if word == "USER"]
    assert int(user.split(":")[0]) == one("Deployment")["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert ("STOPSIGNAL", "SIGTERM") in last
    assert "HEALTHCHECK" in words
    (entry,) = [rest for word, rest in last if word == "ENTRYPOINT"]
    assert entry.startswith("["), "a shell would not pass signals on"
    (given,) = [rest for word, rest in last if word == "CMD"]
    assert set(re.findall(r"--[a-z-]+", given)) <= options()


def test_the_containerfile_installs_what_is_pinned_and_no_more() -> None:
    (install,) = [rest for word, rest in instructions() if "pip --python" in rest]
    assert "--constraint constraints.txt" in install
    assert "--only-binary :all:" in install
    assert ("ARG", "EXTRAS=serve") in instructions()
    kept = (DEPLOY.parent / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [
        name for word, rest in instructions() if word == "COPY" and "--from" not in rest for name in rest.split()[:-1]
    ]
    assert "*" in kept
    assert {f"!{name}" for name in copied} == {line for line in kept if line.startswith("!")}
    assert all((DEPLOY.parent / name).exists() for name in copied)


def test_the_health_check_is_in_the_image_and_asks_past_a_proxy() -> None:
    for page in (DEPLOY / "Containerfile", DEPLOY.parent / "docs" / "deploy.md"):
        (command,) = re.findall(r"podman build .*", page.read_text(encoding="utf-8"))
        assert "--format docker" in command, "the format of OCI has none"
    (check,) = [rest for word, rest in instructions() if word == "HEALTHCHECK"]
    _, *words = json.loads(check.partition("CMD ")[2])
    asked: list[str] = []

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(503 if len(asked) > 1 else 200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = [word.replace(":8000", f":{server.server_port}") for word in words]
        for status in (0, 1):
            nowhere = os.environ | {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
            done = subprocess.run([sys.executable, *words], capture_output=True, check=False, env=nowhere)
            assert done.returncode == status, done.stderr
        server.shutdown()
    assert asked == ["/readyz", "/readyz"]


# --- the capacity model ---


def test_machines_carry_the_rate_when_a_zone_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEPLOY.parent / "scripts"))
    from capacity import Plan  # type: ignore[import-not-found]

    plan = Plan(utilisation=0.5, price=0.1, cores=4, zones=3)
    assert plan.machines(1000, 100.0) == 9, "five carry it, so each zone has three: two of them are left"
    assert plan.month(9) == pytest.approx(9 * 4 * 0.1 * 730)
    assert Plan(utilisation=1.0, cores=1, zones=1).machines(1000, 100.0) == 10
    for rate in (1.0, 999.0, 1e6):
        assert plan.machines(rate, 100.0) * 2 / 3 * 4 * 0.5 * 100.0 >= rate


# --- what the threat model promises ---


def test_the_threat_model_names_tests_that_exist() -> None:
    page = (DEPLOY.parent / "docs" / "threat-model.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 30
    for file, name in named:
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), f"{file}::{name}"
