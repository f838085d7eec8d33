"""Dockerfile, compose file and systemd units: sound by the real linters, and true to the code.

Images are not built here: that takes a container engine and a registry.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from cli.main import vlmq
from shared.settings import load_settings
from workers.node import GRACE_S

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE_FILES = [ROOT / "compose.yaml", DEPLOY / "compose.several.yaml"]
COMPOSE_TEXT = COMPOSE_FILES[0].read_text()
# Variables of .env at their defaults, as `docker compose` would have them without that file.
COMPOSE: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE_TEXT))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name for name, service in SERVICES.items() if "build" in service}
DOCKERFILE = (ROOT / "Dockerfile").read_text()
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
BIN = Path(sys.executable).parent

every_service = pytest.mark.parametrize("name", SERVICES)
every_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)


def seconds(text: str) -> float:
    """``1m30s`` or ``90`` in seconds."""
    units = {"h": 3600, "m": 60, "s": 1, "min": 60, "": 1}
    return sum(float(n) * units[unit] for n, unit in re.findall(r"(\d+)(h|min|m|s|)", text) if n)


def longest_stop_s(*roles: str) -> float:
    """How long a node with these roles may take: its stages one after the other."""
    drain_s = load_settings(DEPLOY / "node.toml").queue.drain_s
    stages = [("api", "batch"), ("chat",), ("engines",)]
    slow = sum(drain_s + GRACE_S for stage in stages if set(stage) & set(roles))
    # The reaper, Valkey, and the farewell to Redis.
    return slow + 3 * GRACE_S


def check_command(words: list[str]) -> None:
    """A command line of ours is one that the command line, or a program of ours, takes."""
    match words:
        case ["vlmq", *rest]:
            command: click.Command = vlmq
            while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
                assert rest[0] in command.commands, words
                command, rest = command.commands[rest[0]], rest[1:]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {w for w in rest if w.startswith("-")} <= {*known, "--help"}, words
        case ["python", "-m", module, *rest]:
            source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
            assert '__name__ == "__main__"' in source, words
            for option in (word for word in rest if word.startswith("-")):
                assert f'"{option}"' in source, words
        case _:
            raise AssertionError(words)


def load_environment(names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables named VLMQ_… are settings, with values that these take."""
    for name, value in names.items():
        if name.startswith("VLMQ_"):
            monkeypatch.setenv(name, value)
    load_settings(DEPLOY / "node.toml")


# --- compose ---


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_a_compose_file_is_of_the_compose_specification(path: Path) -> None:
    """By the specification's own JSON schema."""
    checked = subprocess.run(
        [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("several", [False, True])
def test_docker_compose_itself_renders_it(several: bool, tmp_path: Path) -> None:
    """Every variable, anchor, profile and reference is understood, where compose is installed."""
    command = _docker_compose()
    files = [word for path in COMPOSE_FILES[: 1 + several] for word in ("-f", str(path))]
    rendered = subprocess.run(
        [*command, *files, "--profile", "*", "config", "--format", "json"],
        capture_output=True,
        text=True,
        env={**os.environ, "VALKEY_BIND": "10.0.0.5", "DATA_DIR": "/mnt/shared/vlmq"},
        timeout=60,
        check=False,
    )
    assert rendered.returncode == 0, rendered.stderr
    services = json.loads(rendered.stdout)["services"]
    assert services.keys() == SERVICES.keys()
    assert services["valkey"].get("ports", []) == (
        [{"mode": "ingress", "host_ip": "10.0.0.5", "target": 6379, "published": "6379",
          "protocol": "tcp"}] if several else []
    )  # fmt: skip
    data = {volume["target"]: volume for volume in services["worker"]["volumes"]}
    assert data["/var/lib/vlmq"]["type"] == "bind"


def _docker_compose() -> list[str]:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is not None:
            asked = subprocess.run([*command, "version"], capture_output=True, check=False)
            if asked.returncode == 0:
                return command
    pytest.skip("Docker Compose is not installed here")


@every_service
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    """No root, no capabilities, nothing to write on but volumes and memory."""
    service = SERVICES[name]
    uid, _, gid = service["user"].partition(":")
    assert int(uid) > 0
    assert gid.isdigit()
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "cap_add"} & service.keys()


@every_service
def test_a_service_is_watched_and_kept_up(name: str) -> None:
    """A health check, a restart, and logs that do not fill the disk."""
    service = SERVICES[name]
    kind, *command = service["healthcheck"]["test"]
    assert kind == "CMD"
    assert service["healthcheck"]["retries"] >= 3
    assert service["restart"] == "unless-stopped"
    assert {"max-size", "max-file"} <= service["logging"]["options"].keys()
    if name in OURS:
        check_command(command)


@every_service
def test_a_service_keeps_no_secret_in_its_environment(name: str) -> None:
    """Secrets are files; a variable may name one."""
    service = SERVICES[name]
    for variable, value in service.get("environment", {}).items():
        if re.search("PASSWORD|SECRET|KEY|TOKEN", variable):
            assert variable.endswith("_FILE")
            assert value.startswith("/run/secrets/")
        assert not re.search(r"://[^/]*:[^/]*@", value), "a password in a URL"
    assert set(service.get("secrets", ())) <= COMPOSE["secrets"].keys()
    for path in re.findall(r"/run/secrets/(\w+)", json.dumps(service)):
        assert path in service["secrets"]


@every_service
def test_what_a_service_refers_to_exists(name: str) -> None:
    """Volumes and networks are declared, mounted files are in the repository, images are pinned."""
    service = SERVICES[name]
    for mount in service["volumes"]:
        source, target, *_ = mount.split(":")
        assert target.startswith("/")
        if source in {"./models", "./images"}:
            continue  # people's own
        known = (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
        assert known, mount
    assert set(service["networks"]) <= COMPOSE["networks"].keys()
    assert set(service.get("depends_on", ())) <= SERVICES.keys()
    image, _, tag = service["image"].partition(":")
    assert re.search(r"\d+\.\d+\.\d+", tag), image
    if name in OURS:
        assert service["build"]["target"] in stages()
        assert tag == PROJECT["project"]["version"]


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_service_of_ours_is_started_with_what_it_understands(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command line parses, its variables are settings, its user is the image's."""
    service = SERVICES[name]
    check_command(service["command"])
    load_environment(service.get("environment", {}), monkeypatch)
    assert service["user"] == "10001:10001"
    assert f"./deploy/node.toml:{service['command'][-1]}:ro" in service["volumes"]
    assert "valkey_password" in service["secrets"]


def test_a_service_may_finish_what_it_has_in_hand() -> None:
    """Containers are killed later than the programs in them give up by themselves."""
    workers = longest_stop_s("batch", "chat", "engines")
    assert seconds(SERVICES["worker"]["stop_grace_period"]) >= workers
    assert seconds(SERVICES["worker-cpu"]["stop_grace_period"]) >= workers
    assert seconds(SERVICES["api"]["stop_grace_period"]) >= longest_stop_s("api")


def test_only_this_machine_reaches_what_is_published() -> None:
    """The rest is for whoever changes .env; Valkey is on an inner network alone."""
    for name, service in SERVICES.items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
    assert SERVICES["valkey"]["networks"] == ["queue"]
    assert COMPOSE["networks"]["queue"] == {"internal": True}


def test_only_the_worker_with_gpus_asks_for_them() -> None:
    """All of them, with room in shared memory."""
    asking = {name for name, service in SERVICES.items() if "deploy" in service}
    assert asking == {"worker"}
    [device] = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert SERVICES["worker"]["shm_size"] == "8gb"


def test_prometheus_and_grafana_point_at_each_other() -> None:
    """The scraped service and port are the API's, the data source is Prometheus."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    [target] = config["scrape_configs"][0]["static_configs"][0]["targets"]
    service, _, port = target.partition(":")
    key = config["scrape_configs"][0]["authorization"]["credentials_file"]
    assert key.removeprefix("/run/secrets/") in SERVICES["prometheus"]["secrets"]
    assert SERVICES[service]["ports"][0].endswith(f":{port}")
    assert "./deploy:/etc/prometheus/vlmq:ro" in SERVICES["prometheus"]["volumes"]
    assert "--config.file=/etc/prometheus/vlmq/prometheus.yml" in SERVICES["prometheus"]["command"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "vlmq.yml").read_text())["providers"]
    assert f"./deploy/grafana:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]


def test_valkey_keeps_what_it_was_given() -> None:
    """On disk, and never thrown away for want of memory."""
    lines = (DEPLOY / "valkey" / "valkey.conf").read_text().splitlines()
    assert {"appendonly yes", "maxmemory-policy noeviction", 'save ""'} <= set(lines)


# --- Dockerfile ---


def stages() -> dict[str, str]:
    """The instructions of each stage of the Dockerfile."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert DOCKERFILE.count("\nFROM ") == len(parts) // 3
    return dict(zip(parts[2::3], parts[3::3], strict=True))


TARGETS = ("api", "cpu", "inference", "training")


def test_hadolint_has_nothing_to_say() -> None:
    """The linter of Dockerfiles, with shellcheck for the commands in it."""
    checked = subprocess.run(
        [BIN / "hadolint", "--failure-threshold", "style", ROOT / "Dockerfile"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_a_final_image_runs_as_nobody_in_particular(target: str) -> None:
    """Its last user is the one of compose.yaml, by number, and its command is one of ours."""
    stage = stages()[target]
    assert re.findall(r"^USER (\S+)$", stage, flags=re.MULTILINE) == ["10001:10001"]
    [command] = re.findall(r"^CMD (\[.+\])$", stage, flags=re.MULTILINE)
    check_command(json.loads(command))


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_installs_an_extra_at_its_lock(target: str) -> None:
    """Extras and lock exist, and dependencies come before the sources that change more often."""
    stage = stages()[f"{target}-environment"]
    extras = set(re.findall(r"--extra (\w+)", stage))
    assert extras
    assert extras <= PROJECT["project"]["optional-dependencies"].keys()
    [lock] = set(re.findall(r"--constraints (\S+)", stage))
    assert (ROOT / lock).is_file()
    assert f"COPY {lock} locks/" in stage
    assert stage.index(lock) < stage.index("--extra") < stage.index("COPY . .")
    assert "dev" not in extras


def test_only_the_images_for_engines_have_torch() -> None:
    """The API needs no tensor library."""
    extras = {
        target: set(re.findall(r"--extra (\w+)", stages()[f"{target}-environment"]))
        for target in TARGETS
    }
    assert extras == {
        "api": {"api"},
        "cpu": {"api", "cpu", "parquet"},
        "inference": {"api", "inference", "parquet"},
        "training": {"cpu", "training"},
    }


def test_an_image_has_one_base_at_an_exact_version() -> None:
    """Stages build on each other; the one image from outside is pinned to its patch release."""
    bases = set(re.findall(r"^FROM (\S+) AS", DOCKERFILE, flags=re.MULTILINE)) - stages().keys()
    assert bases == {"${PYTHON_IMAGE}"}
    [image] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", image)
    [uv] = re.findall(r"uv==[\d.]+", DOCKERFILE)
    assert f"\n{uv}\n" in (ROOT / "locks" / "cpu.txt").read_text()


def test_only_what_the_images_are_made_of_is_sent_to_the_builder() -> None:
    """Everything is left out but a list, in which each name exists and none can hold secrets."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {line.removeprefix("!") for line in rules if line.startswith("!")}
    assert let_in == {
        "pyproject.toml",
        "locks",
        *PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"],
        *PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"],
    }
    assert all((ROOT / name).exists() for name in let_in)


def test_secrets_stay_out_of_the_repository() -> None:
    """Where the README has people put them."""
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/.env", "/secrets/"} <= set(ignored)


# --- systemd ---


class Unit:
    """The assignments of a unit file; a key may appear more than once."""

    def __init__(self, path: Path) -> None:
        self.lines = [
            line.partition("=")[::2]
            for line in path.read_text().splitlines()
            if "=" in line and not line.startswith("#")
        ]

    def all(self, key: str) -> list[str]:
        """Every value of ``key``."""
        return [value for name, value in self.lines if name == key]

    def one(self, key: str) -> str:
        """The only value of ``key``."""
        [value] = self.all(key)
        return value


def test_there_is_a_unit_for_each_kind_of_machine() -> None:
    """All in one, API, worker."""
    assert [path.name for path in UNITS] == ["vlmq-api.service", "vlmq-worker.service",
                                             "vlmq.service"]  # fmt: skip


@pytest.fixture
def installed_units(tmp_path: Path) -> Path:
    """The units as on a machine that has vlmq: the programs they name are there."""
    for unit in UNITS:
        text = unit.read_text().replace("/opt/vlmq/bin/", f"{BIN}/")
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def test_systemd_finds_no_fault(installed_units: Path) -> None:
    """``systemd-analyze verify`` says nothing, where it is installed."""
    checked = _systemd_analyze("verify", "--man=no", *sorted(installed_units.glob("*.service")))
    assert checked.returncode == 0, checked.stderr
    assert not [line for line in checked.stderr.splitlines() if str(installed_units) in line]


@every_unit
def test_systemd_finds_a_unit_well_confined(unit: Path, installed_units: Path) -> None:
    """``systemd-analyze security`` rates its exposure (0 best, 10 worst) as OK."""
    path = installed_units / unit.name
    checked = _systemd_analyze("security", "--offline=yes", "--threshold=25", path)
    assert checked.returncode == 0, checked.stdout[-500:] + checked.stderr


def _systemd_analyze(*words: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here (Debian: apt install systemd)")
    return subprocess.run(
        ["systemd-analyze", *words], capture_output=True, text=True, timeout=60, check=False
    )


@every_unit
def test_a_unit_starts_a_command_of_ours_with_settings_of_ours(
    unit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its options exist, and so does what it sets by the environment."""
    service = Unit(unit)
    program, *words = shlex.split(service.one("ExecStart"))
    assert program in {"/opt/vlmq/bin/vlmq", "/opt/vlmq/bin/python"}
    check_command([Path(program).name, *words])
    places = {"%S": "/var/lib", "%t": "/run", "%C": "/var/cache", "%d": "/run/credentials/x"}
    environment = dict(_variables(service, places))
    load_environment(environment, monkeypatch)
    folder = Path(environment["VLMQ_STORAGE__RUN_DIR"])
    assert folder == Path("/run") / service.one("RuntimeDirectory")
    if "VLMQ_REDIS__PASSWORD_FILE" in environment:
        credential, _, _ = service.one("LoadCredential").partition(":")
        assert environment["VLMQ_REDIS__PASSWORD_FILE"] == f"/run/credentials/x/{credential}"


def _variables(service: Unit, places: dict[str, str]) -> Iterator[tuple[str, str]]:
    for line in service.all("Environment"):
        for word in shlex.split(line):
            name, _, value = word.partition("=")
            for specifier, place in places.items():
                value = value.replace(specifier, place)
            yield name, value


@every_unit
def test_a_unit_may_finish_what_it_has_in_hand(unit: Path) -> None:
    """Only the main program is told to stop, and it has the time it may take."""
    service = Unit(unit)
    roles = ("api",) if unit.name == "vlmq-api.service" else ("api", "batch", "chat", "engines")
    assert service.one("KillMode") == "mixed"
    assert seconds(service.one("TimeoutStopSec")) >= longest_stop_s(*roles)
    assert service.one("Restart") == "on-failure"
    assert service.one("User") == "vlmq"


@every_unit
def test_a_unit_that_runs_engines_may_use_gpus(unit: Path) -> None:
    """Each of these options would close /dev; only the API can have them."""
    closing = {"PrivateDevices", "ProtectClock", "DeviceAllow", "DevicePolicy"}
    closed = closing & {name for name, _ in Unit(unit).lines}
    assert bool(closed) == (unit.name == "vlmq-api.service")


def test_the_user_has_the_same_number_everywhere() -> None:
    """So that containers and services can share a folder."""
    sysusers = (DEPLOY / "systemd" / "vlmq.sysusers.conf").read_text()
    assert re.search(r'^u vlmq 10001 "vlmq" /var/lib/vlmq$', sysusers, flags=re.MULTILINE)
    assert "useradd --uid 10001" in DOCKERFILE
