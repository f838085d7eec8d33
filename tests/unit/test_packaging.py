"""The package: what it holds, what it depends on, who may import whom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = sorted((ROOT / "locks").glob("*.txt"))


def imported_after(statement: str) -> set[str]:
    """The top-level modules that are loaded after ``statement`` in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        check=True,
    )
    return set(answer.stdout.split())


def test_the_packages_are_the_literal_folders() -> None:
    """What is imported as ``api`` is the folder ``api``, and so on."""
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert packages == ["api", "workers", "shared", "cli"]
    assert all((ROOT / package / "__init__.py").is_file() for package in packages)


@pytest.mark.parametrize(
    "module", ["api.wsgi", "api.server", "workers.consumer", "workers.reaper", "workers.node"]
)
def test_a_front_program_leaves_torch_alone(module: str) -> None:
    """Programs that are not engines never load a model library."""
    heavy = {"torch", "torchvision", "transformers", "lmdeploy", "xtuner"}
    assert imported_after(f"import {module}") & heavy == set()


def test_a_consumer_leaves_flask_alone() -> None:
    """Only the API is a web application."""
    assert imported_after("import workers.consumer") & {"flask", "gunicorn"} == set()


def test_redis_is_reached_in_one_way() -> None:
    """``connect(settings)``: whoever took ``redis_url`` himself would miss the password's file."""
    takers = {
        str(path.relative_to(ROOT))
        for package in ("api", "workers", "shared", "cli")
        for path in (ROOT / package).rglob("*.py")
        if "redis_url" in path.read_text()
    }
    assert takers == {"shared/connection.py", "shared/settings.py"}


def brought_by(requirement: str) -> set[str]:
    """The distributions that ``pip install`` of ``requirement`` brings here, by canonical name."""
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(requirement)]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras}:
            if (name, extra) in found:
                continue
            found.add((name, extra))
            needs = [Requirement(text) for text in metadata.requires(name) or ()]
            waiting += [
                need for need in needs if not need.marker or need.marker.evaluate({"extra": extra})
            ]
    return {name for name, _ in found}


HIDDEN = """
import sys

class Hide:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hide())
"""


def test_an_installation_for_the_api_lacks_nothing() -> None:
    """What the API's and the workers' programs import is declared, by us or by what we need.

    The environment of the tests has more than that, which is hidden here.
    """
    brought = brought_by("vlmq[api]") | {"vlmq"}
    hidden = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not brought.intersection(map(canonicalize_name, owners))
    }
    assert {"torch", "pytest"} <= hidden
    programs = "api.server, api.wsgi, workers.node, workers.consumer, workers.reaper, cli.main"
    # Celery looks for its transport by name when it first connects.
    loaded = imported_after(
        f"{HIDDEN.format(hidden=hidden)}\nimport {programs}, kombu.transport.redis"
    )
    assert {"flask", "celery", "kombu"} <= loaded


def test_the_import_rules_hold() -> None:
    """import-linter finds every contract of pyproject.toml kept."""
    program = Path(sys.executable).parent / "lint-imports"
    checked = subprocess.run(
        [str(program), "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
    assert " 0 broken" in checked.stdout


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_lock_pins_every_package_and_names_no_index(path: Path) -> None:
    """Each line is a package at one version, perhaps with a marker; nothing else."""
    pin = re.compile(r"[a-z0-9][a-z0-9._-]*==[^\s;]+( ; .+)?")
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    assert [line for line in lines if not pin.fullmatch(line)] == []


def test_there_is_a_lock_for_each_environment() -> None:
    """CPU, training and inference cannot share one."""
    assert [path.stem for path in LOCKS] == ["cpu", "inference", "training"]


@pytest.mark.parametrize(
    ("lock", "pins"),
    [
        ("cpu", ["torch==2.13.0", "transformers==4.48.0"]),
        ("training", ["torch==2.13.0", "transformers==4.48.0", "xtuner==0.2.0"]),
        ("inference", ["lmdeploy==0.18."]),
    ],
)
def test_a_lock_holds_the_version_that_was_tried(lock: str, pins: list[str]) -> None:
    """The versions everything was measured with."""
    text = (ROOT / "locks" / f"{lock}.txt").read_text()
    for pin in pins:
        assert f"\n{pin}" in text


def test_environments_that_cannot_mix_are_declared() -> None:
    """lmdeploy and xtuner want different transformers."""
    conflicts = [{item["extra"] for item in group} for group in PROJECT["tool"]["uv"]["conflicts"]]
    assert {"inference", "training"} in conflicts
    assert {"inference", "cpu"} in conflicts


def test_kombu_does_not_bring_its_pins() -> None:
    """``celery[redis]`` would pin packaging to one exact version."""
    dependencies = PROJECT["project"]["dependencies"]
    assert not [name for name in dependencies if re.match(r"(celery|kombu)\[", name)]
    assert "redis>=6.4,<9" in dependencies


def test_every_ruff_exclusion_has_a_reason() -> None:
    """Each rule that is switched off says why, on its line."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("\nignore = [\n")[2].partition("\n]")[0]
    lines = [line.strip() for line in section.splitlines()]
    assert len(lines) > 10
    assert [line for line in lines if not re.fullmatch(r'"[A-Z]+\d*", # .{6,}', line)] == []
