"""A node and the role of fine-tunes: what it says where they are not possible."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running_node import USUAL_ROLES, RunningNode, running_node, wait_for
from workers.training.libraries import interpreter, missing_libraries

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """An interpreter without any training library."""
    script = tmp_path / "python"
    script.write_text("""#!/bin/sh\necho '{"python": "3.11.7"}'\n""")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


@pytest.fixture
def node() -> Iterator[RunningNode]:
    """A node that is not started yet."""
    with running_node(start=False, node={"roles": list(USUAL_ROLES)}) as found:
        yield found


def configure(node: RunningNode, **finetune: str) -> None:
    """Give its configuration a section for fine-tunes."""
    values = json.loads(node.config.read_text())
    node.config.write_text(json.dumps({**values, "finetune": finetune}))


def test_a_machine_without_the_libraries_says_so_and_serves(
    node: RunningNode, bare_python: str
) -> None:
    """Given the usual roles, when the libraries are missing, then the rest runs all the same."""
    configure(node, python=bare_python)
    node.start()
    assert "no fine-tunes run on this machine" in node.story()
    assert "install vlmq[training], or set finetune.python" in node.story()
    [report] = node.stores.presence.nodes()
    assert ("finetune" in report.programs, report.finetune) == (False, None)


def test_a_machine_that_is_for_fine_tunes_does_not_start_without_the_libraries(
    node: RunningNode, bare_python: str
) -> None:
    """Given roles that name it among few, then the node refuses and says what to install."""
    values = json.loads(node.config.read_text())
    values["node"]["roles"] = ["redis", "reaper", "finetune"]
    node.config.write_text(json.dumps(values))
    configure(node, python=bare_python)
    refused = node.refused()
    assert refused.returncode == 1
    assert "the role 'finetune' is not possible here" in refused.stderr
    assert "torch" in refused.stderr


def test_an_interpreter_that_is_none_is_named(node: RunningNode) -> None:
    """Given a path to nothing, then the setting is named."""
    configure(node, python="/no/such/python")
    refused = node.refused()
    assert refused.returncode == 1
    assert "finetune.python is /no/such/python" in refused.stderr


def test_a_usual_node_runs_fine_tunes(node: RunningNode) -> None:
    """Given the libraries, then the consumer is among the programs and its report among the node's."""
    if missing_libraries(None):
        pytest.skip(f"{interpreter(None)} lacks the training libraries")
    node.start()

    def reported() -> bool:
        return any(
            found.finetune is not None and found.programs.get("finetune") == "ready"
            for found in node.stores.presence.nodes()
        )

    wait_for(reported, "the report", 30, node.story)
