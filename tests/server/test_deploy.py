"""deploy/: every file is read by what reads it elsewhere, as far as that goes without Docker, Grafana or a Mac."""

from __future__ import annotations

import configparser
import json
import plistlib
import re
import shlex
import shutil
import subprocess
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import dockerfile_parse
import httpx
import promql_parser
import pytest
import yaml
from typer.main import get_command

import pippin
from pippin.cli import app
from pippin.config import ServerConfig
from pippin.server.app import OPEN
from tests.server.conftest import Running

ROOT = Path(pippin.__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "pippin.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES: list[str] = [target["expr"] for panel in PANELS for target in panel["targets"]]


def check_command(words: list[str]) -> None:
    """``pippin`` takes these arguments. It is parsed, not run."""
    assert Path(words[0]).name == "pippin"
    command: Any = get_command(app)
    context = command.make_context("pippin", words[1:])
    name, inner, rest = command.resolve_command(context, words[1:])
    assert name == "serve"
    inner.make_context(name, rest, parent=context)


def test_an_unknown_option_would_be_seen() -> None:
    with pytest.raises(Exception, match="--no-such-option"):
        check_command(["pippin", "serve", "--no-such-option"])


# --- Grafana and Prometheus ---


@pytest.fixture(scope="module")
def samples(server: Running) -> dict[str, set[str]]:
    """Every sample that /metrics has once there was traffic, with its labels."""
    with server.http() as http:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        http.post("/v1/chat/completions", json=body).raise_for_status()
        lines = http.get("/metrics").text.splitlines()
    found: dict[str, set[str]] = {"pippin:cache_misses_total": {"model_name", "reason"}}  # there once one has missed
    for line in lines:
        if match := re.match(r"([a-z0-9_:]+)\{(.*)\}", line):
            found[match[1]] = set(re.findall(r'(\w+)="', match[2]))
    return found


def filled(query: str) -> str:
    """A query as Grafana sends it."""
    return query.replace("$__rate_interval", "1m").replace("$model", ".*")


@pytest.mark.parametrize("query", QUERIES)
def test_the_dashboard_asks_for_what_there_is(query: str, samples: dict[str, set[str]]) -> None:
    promql_parser.parse(filled(query))
    names = set(re.findall(r"pippin:\w+", query))
    assert names
    assert names <= samples.keys()
    labels = {label for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(", ")}
    labels |= set(re.findall(r"[{,](\w+)[=!]", query))
    assert all(labels <= samples[name] for name in names)


def test_the_dashboard_uses_counters_as_counters() -> None:
    """A counter alone says nothing; a gauge has no rate."""
    for query in QUERIES:
        for name in re.findall(r"pippin:\w+", query):
            counter = name.endswith(("_total", "_bucket"))
            assert counter == bool(re.search(rf"(rate|increase)\({name}\b", query))


def test_the_dashboards_panels() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS) >= 15
    boxes = [panel["gridPos"] for panel in PANELS]
    assert all(box["x"] >= 0 and box["x"] + box["w"] <= 24 for box in boxes)
    for a, b in combinations(boxes, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    variables = {"$" + variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert {match for query in QUERIES for match in re.findall(r"\$(?!__)\w+", query)} <= variables
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${source}"}


def test_prometheus_scrapes_what_is_open() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] in OPEN
    assert set(job) <= {"job_name", "metrics_path", "static_configs"}
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for target in job["static_configs"][0]["targets"]:
        host, port = target.split(":")
        assert host in services
        assert int(port) == 30000


# --- containers ---


def dockerfile() -> list[tuple[str, str]]:
    parser = dockerfile_parse.DockerfileParser(fileobj=BytesIO((DEPLOY / "Dockerfile").read_bytes()))
    return [(i["instruction"], i["value"]) for i in parser.structure if i["instruction"] != "COMMENT"]


def test_the_dockerfile_builds_from_what_is_there() -> None:
    steps = dockerfile()
    kinds = [kind for kind, _ in steps]
    assert set(kinds) <= {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK",
                          "ENTRYPOINT"}  # fmt: skip
    assert all(re.fullmatch(r"python:3\.1[1-4]-slim-\w+( AS \w+)?", value) for kind, value in steps if kind == "FROM")
    copied = [word for kind, v in steps if kind == "COPY" and "--from" not in v for word in v.split()[:-1]]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
    metadata = (ROOT / "pyproject.toml").read_text()
    assert "README.md" in copied  # which pyproject.toml reads
    extra = next(value.partition("=")[2] for kind, value in steps if kind == "ARG")
    assert re.search(rf"^{extra} = \[", metadata, re.M)
    assert kinds.index("USER") < kinds.index("ENTRYPOINT")  # root serves nobody
    for kind, value in steps:
        if kind == "RUN" and (shell := shutil.which("sh")):
            subprocess.run([shell, "-n", "-c", value.replace("${EXTRA}", "cpu")], check=True)


def test_the_container_serves_and_looks_after_itself(http: httpx.Client) -> None:
    steps = dict(dockerfile())
    entrypoint = json.loads(steps["ENTRYPOINT"])
    check_command(entrypoint)
    port = entrypoint[entrypoint.index("--port") + 1]
    assert steps["EXPOSE"] == port
    code = json.loads(steps["HEALTHCHECK"].partition("CMD ")[2])[2]
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", code)
    assert url
    assert url[1] == port
    assert url[2] in OPEN
    exec(code.replace(url[0], f"{http.base_url}".rstrip("/") + url[2]))  # raises unless it is well


def test_compose_mounts_what_is_there() -> None:
    config = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in config["services"].values():
        assert ("image" in service) != ("build" in service)
        assert not service.get("image", ":1").endswith((":latest", "grafana", "prometheus"))
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])  # nobody else until someone decides so
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).is_file() if source.startswith("./") else source in config["volumes"]
    build = config["services"]["pippin"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    provider = yaml.safe_load((DEPLOY / "grafana" / "dashboards.yaml").read_text())["providers"][0]
    mounts = [volume.split(":")[1] for volume in config["services"]["grafana"]["volumes"]]
    assert any(Path(mount).parent == Path(provider["options"]["path"]) for mount in mounts)
    source = yaml.safe_load((DEPLOY / "grafana" / "datasource.yaml").read_text())["datasources"][0]
    assert re.fullmatch(r"http://prometheus:\d+", source["url"])


# --- services of the system ---


def test_the_systemd_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "pippin.service").read_text()
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    command = shlex.split(unit["Service"]["ExecStart"])
    check_command([word for word in command if word != "$PIPPIN_ARGS"])
    assert unit["Service"]["RestartPreventExitStatus"] == "2"  # what a wrong option exits with
    if shutil.which("systemd-analyze") is None:
        return
    copy = tmp_path / "pippin.service"
    copy.write_text(text.replace(command[0], shutil.which("true") or "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60
    )
    ours = [line for line in done.stderr.splitlines() if "pippin" in line]
    assert ours == []


def test_nobody_kills_it_while_it_drains() -> None:
    patience = ServerConfig().drain_timeout + 5  # and the engine ends after the last answer
    agent = plistlib.loads((DEPLOY / "org.pippin.serve.plist").read_bytes())
    assert agent["ExitTimeOut"] > patience
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", (DEPLOY / "pippin.service").read_text(), re.M)
    assert int(seconds) > patience
    pippin = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["pippin"]
    assert int(pippin["stop_grace_period"].removesuffix("s")) > patience


def test_the_launchd_agent() -> None:
    path = DEPLOY / "org.pippin.serve.plist"
    agent = plistlib.loads(path.read_bytes())
    assert agent["Label"] == path.stem
    check_command(agent["ProgramArguments"])
    assert agent["ProgramArguments"][0].startswith("/")  # launchd has no PATH and expands nothing
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert set(agent) <= {
        "Label", "ProgramArguments", "RunAtLoad", "KeepAlive", "ThrottleInterval", "ExitTimeOut", "ProcessType",
        "SoftResourceLimits", "StandardOutPath", "StandardErrorPath", "EnvironmentVariables",
    }  # fmt: skip
