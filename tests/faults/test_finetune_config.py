"""An owner's own configuration is code: run only for those who may, and tried before any training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared.finetunes import Finetune, FinetuneState
from tests.finetunes import OWNER, Running, create, training_node
from workers.training.config import training_template

pytestmark = [pytest.mark.timeout(180)]

LIMIT_S = 120.0
"""The real interpreter imports xtuner for it."""


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """A node that runs this owner's configurations."""
    with training_node(finetune={"config_owners": [OWNER]}) as found:
        yield found


def refused(running: Running, config: str) -> Finetune:
    """The job with this configuration, failed before it was trained."""
    job = create(running.stores, config=config)
    failed = running.wait_state(job.id, FinetuneState.FAILED, limit_s=LIMIT_S)
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("training_config_invalid", "config_file")
    assert failed.started_at is None
    return failed


def test_a_configuration_of_ones_own_is_used_with_the_jobs_data(running: Running) -> None:
    """Given one that would read data of its own, then the job's base and rows stand in its place."""
    template = training_template().read_text(encoding="utf-8")
    own = template.replace("total_iterations = 1000", "total_iterations = 30")
    job = create(running.stores, config=own)
    done = running.wait(job.id, lambda now: now.stage == "compare", "the comparison", LIMIT_S)
    assert done.progress.total_steps == 30
    [used] = running.stores.finetunes.path(job.id).glob("work/*/order/config.py")
    assert f"{running.stores.finetunes.path(job.id)}/data/train.json" in used.read_text()
    running.stores.finetunes.want(OWNER, job.id, "cancel")


def test_one_that_cannot_be_imported_is_refused_with_its_error(running: Running) -> None:
    """Given an import of nothing, then the job fails at once and the error is quoted."""
    template = training_template().read_text(encoding="utf-8")
    own = template.replace("type=InternVL_V1_5,", "type=Better,")
    failed = refused(running, f"from a_module_that_is_not_there import Better\n{own}")
    assert failed.error is not None
    assert "a_module_that_is_not_there" in failed.error.message


@pytest.mark.parametrize(
    ("config", "words"),
    [("model = (", "no valid Python: line 1"), ("model = 1\n", "it must set path")],
)
def test_one_that_is_no_configuration_is_refused(running: Running, config: str, words: str) -> None:
    """Given text that is none, then what is missing is said, and nothing is run."""
    failed = refused(running, config)
    assert failed.error is not None
    assert words in failed.error.message


def test_an_owner_without_that_right_runs_no_code() -> None:
    """Given a worker that runs no configurations, then nothing of the file is run."""
    with training_node() as running:
        marker = running.node.folder / "was-run"
        template = training_template().read_text(encoding="utf-8")
        failed = refused(running, f"open({str(marker)!r}, 'w').close()\n{template}")
        assert failed.error is not None
        assert "finetune.config_owners" in failed.error.message
        assert not marker.exists()
