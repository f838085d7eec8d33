"""Fine-tunes over HTTP, driven by the unmodified SDK.

No worker runs: jobs stay as they are until the test claims them as a worker would.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from shared.clock import unix_now
from shared.finetune_store import NewEvent
from shared.finetunes import FinetuneError, FinetuneState, Progress
from shared.models import ModelRegistry
from shared.presence import NodeReport, ReplicaReport
from shared.stores import Stores
from tests import stored_batches
from tests.checkpoints import CONFIG, TUNABLE, write_checkpoint
from tests.claimed_finetunes import claim, link_tuned, save, training
from tests.integration.api_server import ApiServer, StartApi
from tests.running_node import wait_for

OWNER = "local"
ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
KEYS = {
    "id",
    "object",
    "created_at",
    "finished_at",
    "model",
    "fine_tuned_model",
    "organization_id",
    "status",
    "hyperparameters",
    "method",
    "training_file",
    "validation_file",
    "result_files",
    "trained_tokens",
    "error",
    "seed",
    "estimated_finish",
    "metadata",
    "vlmq",
}
OURS = {
    "stage",
    "wanted",
    "waiting_for",
    "suffix",
    "started_at",
    "attempts",
    "progress",
    "recipe",
    "data",
    "config_file",
    "resolved",
    "data_report",
}
AUTO = {"batch_size": "auto", "learning_rate_multiplier": "auto", "n_epochs": "auto"}


@pytest.fixture(scope="module", autouse=True)
def base(sdk: openai.OpenAI, stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A linked model that can be tuned."""
    folder = tmp_path_factory.mktemp("checkpoints")
    stores.models.link("base", write_checkpoint(folder / "base", TUNABLE))
    _await(sdk, "base")
    return "base"


@pytest.fixture(scope="module")
def rows(sdk: openai.OpenAI) -> str:
    """An uploaded training file."""
    return sdk.files.create(file=("rows.jsonl", ROW), purpose="fine-tune").id


def _create(sdk: openai.OpenAI, rows: str, **changes: Any) -> FineTuningJob:
    return sdk.fine_tuning.jobs.create(**{"model": "base", "training_file": rows, **changes})


def _await(sdk: openai.OpenAI, *names: str) -> None:
    """Models linked beside the server are known to it within a second."""
    known: set[str] = set()

    def are_known() -> bool:
        for name in set(names) - known:
            try:
                sdk.models.retrieve(name)
            except openai.NotFoundError:
                return False
            known.add(name)
        return True

    wait_for(are_known, f"{names} to be known", 20)


def _refused(sdk: openai.OpenAI, rows: str, **changes: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as refused:
        _create(sdk, rows, **changes)
    return refused.value


def test_a_created_job_says_everything_it_will_ever_say(sdk: openai.OpenAI, rows: str) -> None:
    """Every key of the object is there from the start, with its type."""
    raw = sdk.fine_tuning.jobs.with_raw_response.create(
        model="base",
        training_file=rows,
        suffix="food",
        seed=7,
        metadata={"who": "me"},
        extra_body={"vlmq": {"lora_rank": 8, "gpus": 2}},
    )
    body = raw.http_response.json()
    assert set(body) == KEYS
    assert set(body["vlmq"]) == OURS
    assert body["hyperparameters"] == AUTO
    assert body["method"] == {"type": "supervised", "supervised": {"hyperparameters": AUTO}}
    assert (body["vlmq"]["stage"], body["vlmq"]["wanted"]) == ("validate", "run")
    assert (body["vlmq"]["recipe"]["lora_rank"], body["vlmq"]["recipe"]["gpus"]) == (8, 2)
    assert body["vlmq"]["resolved"] is None
    job = raw.parse()
    assert job.id.startswith("ftjob-")
    assert (job.object, job.status, job.model) == ("fine_tuning.job", "validating_files", "base")
    assert (job.seed, job.metadata, job.training_file) == (7, {"who": "me"}, rows)
    assert (job.organization_id, job.result_files, job.error) == (OWNER, [], None)
    assert job.method is not None
    assert job.method.supervised is not None
    assert sdk.fine_tuning.jobs.retrieve(job.id) == job


def test_a_seed_is_chosen_if_none_is_given(sdk: openai.OpenAI, rows: str) -> None:
    """And it is another one each time."""
    seeds = {_create(sdk, rows).seed for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize("form", ["method", "hyperparameters"])
def test_hyperparameters_are_shown_as_they_were_asked_for(
    sdk: openai.OpenAI, rows: str, form: str
) -> None:
    """In both places of the object, whichever place they were given in."""
    given = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": given}}
    job = _create(sdk, rows, **{form: method if form == "method" else given})
    shown = sdk.fine_tuning.jobs.retrieve(job.id)
    assert shown.hyperparameters.to_dict() == given
    assert shown.method is not None
    assert shown.method.supervised is not None
    assert shown.method.supervised.hyperparameters is not None
    assert shown.method.supervised.hyperparameters.to_dict() == given


def test_what_the_server_chose_is_shown_once_it_has(
    sdk: openai.OpenAI, stores: Stores, rows: str
) -> None:
    """Given auto, when a worker has resolved it, then the numbers stand in its place.

    While it trains there is an estimate of its end; once it was given back there is none.
    """
    job = _create(sdk, rows, hyperparameters={"n_epochs": 4})
    with training(stores, job.id) as lease:
        stores.finetunes.note(lease, resolved={"batch_size": 32, "learning_rate": 3e-5})
        stores.finetunes.note(lease, progress=Progress(1, 10, eta_s=600.0))
        shown = sdk.fine_tuning.jobs.retrieve(job.id)
    assert shown.status == "running"
    assert shown.estimated_finish is not None
    assert shown.estimated_finish >= job.created_at + 600
    assert sdk.fine_tuning.jobs.retrieve(job.id).estimated_finish is None
    assert shown.hyperparameters.to_dict() == {
        "n_epochs": 4,
        "batch_size": 32,
        "learning_rate_multiplier": 1.0,
    }


def test_a_base_that_no_engine_could_load_is_refused_with_the_engines_words(
    sdk: openai.OpenAI, stores: Stores, rows: str, tmp_path: Path
) -> None:
    """It would be trained for hours and then wait for its comparison; another node helps."""
    stores.models.link("unloved", write_checkpoint(tmp_path / "unloved", TUNABLE))
    _await(sdk, "unloved")
    failed = ReplicaReport("unloved", 0, "failed", detail="only InternLM2 is known here")
    stores.presence.announce(NodeReport("first", unix_now(), [failed]), ttl_s=60)
    time.sleep(1)  # the server looks twice a second
    refused = _refused(sdk, rows, model="unloved")
    assert refused.status_code == 400
    assert refused.param == "model"
    assert "node first says: only InternLM2 is known here" in refused.message
    ready = ReplicaReport("unloved", 0, "ready")
    stores.presence.announce(NodeReport("second", unix_now(), [ready]), ttl_s=60)
    wait_for(lambda: stores.presence.refusal("unloved") is None, "the second node", 20)
    time.sleep(1)
    assert _create(sdk, rows, model="unloved").status == "validating_files"


def test_the_list_is_paged_by_the_sdk(sdk: openai.OpenAI, rows: str) -> None:
    """Newest first, over any number of pages, each once."""
    made = [_create(sdk, rows, metadata={"page": "yes"}).id for _ in range(5)]
    listed = [job.id for job in sdk.fine_tuning.jobs.list(limit=2, metadata={"page": "yes"})]
    assert listed == made[::-1]
    page = sdk.fine_tuning.jobs.list(limit=2)
    assert ([job.id for job in page.data], page.has_more) == (made[:2:-1], True)
    after = [job.id for job in sdk.fine_tuning.jobs.list(after=made[3], limit=2).data]
    assert after == made[2:0:-1]


def test_the_list_is_filtered_by_metadata(sdk: openai.OpenAI, rows: str) -> None:
    """All pairs must hold; no job has the wrong one."""
    first = _create(sdk, rows, metadata={"team": "a", "run": "1"}).id
    second = _create(sdk, rows, metadata={"team": "a", "run": "2"}).id

    def found(**pairs: str) -> list[str]:
        return [job.id for job in sdk.fine_tuning.jobs.list(metadata=pairs)]

    assert found(team="a") == [second, first]
    assert found(team="a", run="1") == [first]
    assert found(team="b") == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("after=nothing", "after"),
        ("order=asc", "order"),
        ("metadata=null", "metadata"),
        ("metadata[a]=1&metadata[a]=2", "metadata[a]"),
        ("metadata[" + "k" * 65 + "]=1", "metadata"),
    ],
)
def test_a_bad_query_is_named(api: ApiServer, query: str, param: str) -> None:
    """A 400 whose ``param`` is the parameter."""
    answer = httpx.get(f"{api.base_url}/fine_tuning/jobs?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


def test_a_job_that_nobody_holds_changes_at_once(sdk: openai.OpenAI, rows: str) -> None:
    """Pause, resume and cancel answer with the job as it is then; asking twice is asking once."""
    jobs = sdk.fine_tuning.jobs
    job = _create(sdk, rows)
    assert jobs.pause(job.id).status == "paused"
    assert jobs.pause(job.id).status == "paused"
    assert jobs.resume(job.id).status == "validating_files"
    cancelled = jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at is not None
    assert jobs.cancel(job.id).status == "cancelled"


def test_what_has_ended_does_not_go_on(sdk: openai.OpenAI, rows: str) -> None:
    """A permanent 400, which the SDK does not send again."""
    jobs = sdk.fine_tuning.jobs
    job = jobs.cancel(_create(sdk, rows).id)
    for ask in (jobs.resume, jobs.pause):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(job.id)
        assert refused.value.code == "illegal_transition"
        assert refused.value.response.headers["x-should-retry"] == "false"


def test_a_job_in_work_is_asked_and_then_stops(
    sdk: openai.OpenAI, stores: Stores, rows: str
) -> None:
    """The wish shows at once, the state when the worker has let go."""
    job = _create(sdk, rows)
    with training(stores, job.id) as lease:
        raw = sdk.fine_tuning.jobs.with_raw_response.pause(job.id).http_response.json()
        assert (raw["status"], raw["vlmq"]["wanted"]) == ("running", "pause")
        assert stores.finetunes.renew(lease) == "pause"
        stores.finetunes.move(lease, FinetuneState.PAUSED, message="It paused at step 5")
    assert sdk.fine_tuning.jobs.retrieve(job.id).status == "paused"


def test_events_are_newest_first_and_paged(sdk: openai.OpenAI, stores: Stores, rows: str) -> None:
    """Messages and metrics, each once, with the SDK's own paging."""
    job = _create(sdk, rows)
    metrics = [
        NewEvent(f"step {step}", type="metrics", data={"step": step, "train_loss": 1.5})
        for step in range(1, 31)
    ]
    with training(stores, job.id) as lease:
        stores.finetunes.add_events(lease, metrics)
    events = sdk.fine_tuning.jobs.list_events
    first = events(job.id)
    assert (len(first.data), first.has_more) == (20, True)
    everything = list(events(job.id, limit=7))
    assert len({event.id for event in everything}) == len(everything) >= 31
    steps = [event.data["step"] for event in everything if event.type == "metrics"]  # type: ignore[index]
    assert steps == list(range(30, 0, -1))
    oldest = everything[-1]
    assert (oldest.object, oldest.type, oldest.level) == (
        "fine_tuning.job.event",
        "message",
        "info",
    )
    other = _create(sdk, rows)
    for wrong in (events(other.id).data[0].id, "ftevent-x", "7"):
        with pytest.raises(openai.BadRequestError) as refused:
            events(job.id, after=wrong)
        assert refused.value.param == "after"


def test_checkpoints_are_newest_first_and_paged(
    sdk: openai.OpenAI, stores: Stores, rows: str
) -> None:
    """Each with its step, its losses and the name its model would have."""
    job = _create(sdk, rows, suffix="food")
    with training(stores, job.id) as lease:
        save(stores, lease, range(10, 130, 10))
        checkpoints = sdk.fine_tuning.jobs.checkpoints.list
        first = checkpoints(job.id)
        assert (len(first.data), first.has_more) == (10, True)
        everything = list(checkpoints(job.id, limit=5))
    assert [one.step_number for one in everything] == list(range(120, 0, -10))
    newest = everything[0]
    assert newest.object == "fine_tuning.job.checkpoint"
    assert newest.fine_tuning_job_id == job.id
    assert (newest.metrics.step, newest.metrics.train_loss) == (120, 0.5)
    name = f"ft:base:food:{job.id.removeprefix('ftjob-')}:ckpt-step-120"
    assert newest.fine_tuned_model_checkpoint == name
    with pytest.raises(openai.BadRequestError) as refused:
        checkpoints(job.id, after="ftckpt_x")
    assert refused.value.param == "after"


def test_a_checkpoint_is_served_on_request(
    api: ApiServer, sdk: openai.OpenAI, stores: Stores, rows: str
) -> None:
    """The request is recorded; asking twice is asking once; an unknown checkpoint is a 404."""
    job = _create(sdk, rows)
    with training(stores, job.id) as lease:
        save(stores, lease, [10])
    [checkpoint] = sdk.fine_tuning.jobs.checkpoints.list(job.id).data
    place = f"{api.base_url}/fine_tuning/jobs/{job.id}/checkpoints"
    for _ in range(2):
        answer = httpx.post(f"{place}/{checkpoint.id}/serve").json()
        assert answer["id"] == checkpoint.id
        assert answer["vlmq"] == {"model": None, "conversion": "requested"}
    missing = httpx.post(f"{place}/{checkpoint.id}0/serve")
    assert (missing.status_code, missing.json()["error"]["param"]) == (
        404,
        "fine_tuning_checkpoint_id",
    )


def test_a_served_checkpoint_is_deleted_and_served_anew(
    api: ApiServer, sdk: openai.OpenAI, stores: Stores, rows: str, tmp_path: Path
) -> None:
    """Given a checkpoint's model that was deleted, then the checkpoint can be asked for again."""
    job = _create(sdk, rows)
    with training(stores, job.id) as lease:
        save(stores, lease, [10])
    [checkpoint] = sdk.fine_tuning.jobs.checkpoints.list(job.id).data
    place = f"{api.base_url}/fine_tuning/jobs/{job.id}/checkpoints/{checkpoint.id}/serve"
    name = checkpoint.fine_tuned_model_checkpoint
    for _ in range(2):
        assert httpx.post(place).json()["vlmq"] == {"model": None, "conversion": "requested"}
        conversion = claim(stores, "checkpoint", job.id)
        link_tuned(stores, name, write_checkpoint(tmp_path / "ten", TUNABLE), job=job.id)
        stores.finetunes.finish_checkpoint(conversion, model=name)
        assert httpx.post(place).json()["vlmq"] == {"model": name, "conversion": "served"}
        _await(sdk, name)
        sdk.models.delete(name)
    [checkpoint] = sdk.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoint.to_dict()["vlmq"] == {"model": None, "conversion": None}


def test_how_a_job_ended_is_told(sdk: openai.OpenAI, stores: Stores, rows: str) -> None:
    """A failed job has its reason, a successful one its model and files."""
    failed = _create(sdk, rows)
    with training(stores, failed.id) as lease:
        error = FinetuneError("training_diverged", "the loss is NaN at step 7")
        stores.finetunes.move(lease, FinetuneState.FAILED, message="It failed", error=error)
    succeeded = _create(sdk, rows)
    with training(stores, succeeded.id) as lease:
        stores.finetunes.move(
            lease,
            FinetuneState.SUCCEEDED,
            message="It is done",
            fine_tuned_model="ft:base::x",
            result_files=["file-r"],
            trained_tokens=1234,
        )
    shown = sdk.fine_tuning.jobs.retrieve(failed.id)
    assert shown.error is not None
    assert (shown.error.code, shown.error.message, shown.error.param) == (
        "training_diverged",
        "the loss is NaN at step 7",
        None,
    )
    assert shown.finished_at is not None
    done = sdk.fine_tuning.jobs.retrieve(succeeded.id)
    assert (done.status, done.fine_tuned_model) == ("succeeded", "ft:base::x")
    assert (done.result_files, done.trained_tokens, done.error) == (["file-r"], 1234, None)


def test_the_same_request_sent_twice_makes_one_job(api: ApiServer, rows: str) -> None:
    """``Idempotency-Key``, as for other creating requests."""
    place, headers = f"{api.base_url}/fine_tuning/jobs", {"Idempotency-Key": "once"}
    body = {"model": "base", "training_file": rows}
    first = httpx.post(place, json=body, headers=headers)
    again = httpx.post(place, json=body, headers=headers)
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    other = httpx.post(place, json={**body, "suffix": "x"}, headers=headers)
    assert other.status_code == 422


def test_a_job_that_is_not_there_is_a_404(sdk: openai.OpenAI) -> None:
    """Whatever is asked of it, and whatever its id looks like."""
    jobs = sdk.fine_tuning.jobs
    for job_id in ("ftjob-0123456789abcdef01234567", "nothing", "ftjob-..%2f"):
        for ask in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.list_events):
            with pytest.raises(openai.NotFoundError):
                ask(job_id)
        with pytest.raises(openai.NotFoundError):
            jobs.checkpoints.list(job_id)


# --- what a job may name --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"training_file": "file-0123456789abcdef01234567"}, "training_file"),
        ({"training_file": "../../etc/passwd"}, "training_file"),
        ({"training_file": "batch_0123456789abcdef01234567"}, "training_file"),
        ({"validation_file": "file-0123456789abcdef01234567"}, "validation_file"),
        ({"validation_file": "batch_0123456789abcdef01234567"}, "validation_file"),
        ({"extra_body": {"vlmq": {"images": "file-0123456789abcdef01234567"}}}, "vlmq.images"),
        ({"extra_body": {"vlmq": {"images": "/etc"}}}, "vlmq.images"),
        ({"extra_body": {"vlmq": {"lora_rnk": 8}}}, "vlmq.lora_rnk"),
        ({"method": {"type": "dpo"}}, "method.type"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]},
            "integrations",
        ),
        ({"suffix": "s p a c e"}, "suffix"),
    ],
)
def test_what_is_not_there_or_not_supported_is_named(
    sdk: openai.OpenAI, rows: str, changes: dict[str, Any], param: str
) -> None:
    """A 400 whose ``param`` is the field."""
    error = _refused(sdk, rows, **changes)
    assert (error.status_code, error.param) == (400, param)


def test_files_are_for_what_they_were_uploaded_for(sdk: openai.OpenAI, rows: str) -> None:
    """A batch's input and a picture are no training data; an archive may be either of two."""
    of_batch = sdk.files.create(file=("in.jsonl", ROW), purpose="batch").id
    picture = sdk.files.create(file=("a.tar", b"x"), purpose="vision").id
    for wrong in (of_batch, picture):
        assert _refused(sdk, wrong).param == "training_file"
        assert _refused(sdk, rows, validation_file=wrong).param == "validation_file"
    archived = {"vlmq": {"images": of_batch}}
    assert _refused(sdk, rows, extra_body=archived).param == "vlmq.images"
    job = _create(sdk, rows, extra_body={"vlmq": {"images": picture}})
    assert job.to_dict()["vlmq"]["data"]["images"] == picture  # type: ignore[index]


def test_a_file_that_a_live_job_reads_is_not_deleted(sdk: openai.OpenAI) -> None:
    """A 409 until the job has ended."""
    file_id = sdk.files.create(file=("rows.jsonl", ROW), purpose="fine-tune").id
    job = _create(sdk, file_id)
    with pytest.raises(openai.ConflictError) as refused:
        sdk.files.delete(file_id)
    assert refused.value.code == "file_in_use"
    sdk.fine_tuning.jobs.cancel(job.id)
    assert sdk.files.delete(file_id).deleted


def test_a_batch_is_data_once_it_has_ended(sdk: openai.OpenAI, stores: Stores) -> None:
    """Not before, for more answers may come; and not without its requests, which are the questions."""
    batch = stored_batches.planned(stores, 2, owner=OWNER)
    early = _refused(sdk, batch.id)
    assert (early.param, "has not ended" in early.message) == ("training_file", True)
    stored_batches.commit(stores, stored_batches.claim(stores), completed=2)
    stored_batches.run_control(stores)
    ended = stored_batches.now(stores, batch)
    assert ended.output_file_id is not None
    for name in (ended.output_file_id, batch.id):
        job = _create(sdk, name, validation_file=name)
        assert (job.training_file, job.validation_file) == (batch.id, batch.id)
        sdk.fine_tuning.jobs.cancel(job.id)
    job = _create(sdk, batch.id)
    with pytest.raises(openai.ConflictError):
        sdk.files.delete(batch.input_file_id)
    sdk.fine_tuning.jobs.cancel(job.id)
    sdk.files.delete(batch.input_file_id)
    late = _refused(sdk, batch.id)
    assert (late.param, batch.input_file_id in late.message) == ("training_file", True)


def test_a_batch_without_answers_is_no_data(sdk: openai.OpenAI, stores: Stores) -> None:
    """There is nothing to learn from lines that all failed."""
    batch = stored_batches.planned(stores, 2, owner=OWNER)
    stored_batches.commit(stores, stored_batches.claim(stores), completed=0, failed=2)
    stored_batches.run_control(stores)
    assert "has no answers" in _refused(sdk, batch.id).message


def test_only_some_models_can_be_tuned(
    sdk: openai.OpenAI, stores: Stores, rows: str, tmp_path: Path
) -> None:
    """Others are refused with what works; so are models without a checkpoint."""
    qwen = {**CONFIG, "llm_config": {"architectures": ["Qwen2ForCausalLM"]}}
    stores.models.link("qwen", write_checkpoint(tmp_path / "qwen", qwen))
    stores.models.link("echo", None, engine="echo", replace=True)
    _await(sdk, "qwen", "echo")
    for model, said in (("qwen", "Qwen2ForCausalLM"), ("echo", "no checkpoint")):
        error = _refused(sdk, rows, model=model)
        assert (error.status_code, error.param) == (400, "model")
        assert said in error.message
        assert "InternLM2" in error.message
    assert _refused(sdk, rows, model="nobody").status_code == 404


def test_a_name_that_would_be_too_long_is_refused(
    sdk: openai.OpenAI, stores: Stores, rows: str, tmp_path: Path
) -> None:
    """Before anything is trained that could not be registered afterwards."""
    name = "b" * 90
    stores.models.link(name, write_checkpoint(tmp_path / "long", TUNABLE))
    _await(sdk, name)
    assert _refused(sdk, rows, model=name, suffix="food").param == "suffix"
    assert _refused(sdk, rows, model=name).param == "model"
    longest = _create(sdk, rows, suffix="s" * 64)
    ModelRegistry(stores.layout).require_free(
        f"ft:base:{'s' * 64}:{longest.id.removeprefix('ftjob-')}:ckpt-step-9999999", replace=False
    )


@pytest.fixture(scope="module")
def rooted(
    start_api: StartApi, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ApiServer, Path]]:
    """A server that reads images from its disk, and runs configurations of the owner ``local``."""
    root = tmp_path_factory.mktemp("images")
    more = f'[images]\nroots = ["{root}"]\n[finetune]\nconfig_owners = ["local"]\n'
    with start_api(more=more) as server:
        found = Stores.connect(server.settings)
        found.models.link("base", write_checkpoint(server.folder / "base", TUNABLE))
        found.close()
        _await(server.client(), "base")
        yield server, root


def test_images_come_from_below_the_roots_only(
    rooted: tuple[ApiServer, Path], tmp_path: Path
) -> None:
    """A folder inside is taken; links and dots that lead out are not, nor what is not there."""
    server, root = rooted
    sdk = server.client()
    rows = sdk.files.create(file=("rows.jsonl", ROW), purpose="fine-tune").id
    (root / "food").mkdir()
    (root / "out").symlink_to(tmp_path)
    (root / "picture.jpg").write_bytes(b"x")
    for good in (root, root / "food", f"{root}/food/"):
        _create(sdk, rows, extra_body={"vlmq": {"images": str(good)}})
    outside = [tmp_path, root / "out", f"{root}/../x", f"{root}x", "food", "/", f"{root}/a\0b"]
    absent = [root / "none", root / "picture.jpg", f"{root}/{'n' * 300}"]
    said = set()
    for bad in [*outside, *absent]:
        error = _refused(sdk, rows, extra_body={"vlmq": {"images": str(bad)}})
        assert (error.status_code, error.param) == (400, "vlmq.images"), bad
        said.add(error.message)
    assert not any(str(tmp_path) in message for message in said)


def test_a_configuration_is_taken_from_whoever_has_the_right(
    rooted: tuple[ApiServer, Path], sdk: openai.OpenAI, rows: str
) -> None:
    """Only owners that the setting names, without API keys as well: it is code."""
    code = {"file": ("config.py", b"lr = 1"), "purpose": "fine-tune"}
    theirs = sdk.files.create(**code).id  # type: ignore[arg-type]
    refused = _refused(sdk, rows, extra_body={"vlmq": {"config_file": theirs}})
    assert (refused.status_code, refused.param) == (403, "vlmq.config_file")
    other = rooted[0].client()
    data = other.files.create(file=("rows.jsonl", ROW), purpose="fine-tune").id
    config = other.files.create(**code).id  # type: ignore[arg-type]
    job = _create(other, data, extra_body={"vlmq": {"config_file": config}})
    assert job.to_dict()["vlmq"]["config_file"] == config  # type: ignore[index]
    missing = {"vlmq": {"config_file": "file-0123456789abcdef01234567"}}
    assert _refused(other, data, extra_body=missing).param == "vlmq.config_file"


# --- whose it is ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_server(start_api: StartApi) -> Iterator[ApiServer]:
    """A server with two owners."""
    with start_api(owners=("ann", "bob")) as server:
        yield server


def test_what_is_somebody_elses_is_not_there(shared_server: ApiServer) -> None:
    """Neither the job, nor its events, nor the files it could be made from."""
    ann, bob = (shared_server.client(shared_server.secrets[name]) for name in ("ann", "bob"))
    stores = Stores.connect(shared_server.settings)
    stores.models.link("base", write_checkpoint(shared_server.folder / "base", TUNABLE))
    _await(ann, "base")
    rows = ann.files.create(file=("rows.jsonl", ROW), purpose="fine-tune").id
    job = _create(ann, rows)
    assert job.organization_id == "ann"
    for ask in (bob.fine_tuning.jobs.retrieve, bob.fine_tuning.jobs.cancel):
        with pytest.raises(openai.NotFoundError):
            ask(job.id)
    with pytest.raises(openai.NotFoundError):
        bob.fine_tuning.jobs.list_events(job.id)
    assert list(bob.fine_tuning.jobs.list()) == []
    assert _refused(bob, rows).param == "training_file"
    assert ann.fine_tuning.jobs.retrieve(job.id).status == "validating_files"
    stores.close()


def test_a_tuned_model_is_deleted_by_whose_job_made_it(shared_server: ApiServer) -> None:
    """Its owner; nobody else, whether they see it or not; and what was linked stays linked."""
    ann, bob = (shared_server.client(shared_server.secrets[name]) for name in ("ann", "bob"))
    stores = Stores.connect(shared_server.settings)
    folder = write_checkpoint(shared_server.folder / "kept", TUNABLE)
    stores.models.link("linked", folder)
    _await(ann, "linked")
    rows = ann.files.create(file=("rows.jsonl", ROW), purpose="fine-tune").id
    job = _create(ann, rows, model="linked")
    private = link_tuned(stores, "ft:linked:mine:1", folder, job=job.id, visible_to="ann")
    public = link_tuned(stores, "ft:linked:ours:1", folder, job=job.id)
    _await(ann, private, public)
    assert public in [model.id for model in bob.models.list()]
    assert private not in [model.id for model in bob.models.list()]
    with pytest.raises(openai.PermissionDeniedError):
        bob.models.delete(public)
    with pytest.raises(openai.NotFoundError):
        bob.models.delete(private)
    with pytest.raises(openai.PermissionDeniedError):
        ann.models.delete("linked")
    for name in (private, public):
        assert ann.models.delete(name).to_dict() == {
            "id": name,
            "object": "model",
            "deleted": True,
        }
        with pytest.raises(openai.NotFoundError):
            ann.models.retrieve(name)
    assert (folder / "model.safetensors").exists()
    stores.close()


def test_a_candidate_is_not_there_yet(
    sdk: openai.OpenAI, stores: Stores, rows: str, tmp_path: Path
) -> None:
    """Until its comparison has ended a tuned model is in no list and can be used by no request."""
    folder = write_checkpoint(tmp_path / "tuned", TUNABLE)
    name = link_tuned(stores, "ft:base:new:1", folder, job="ftjob-1", candidate=True)
    link_tuned(stores, "ft:base:old:1", folder, job="ftjob-1")
    _await(sdk, "ft:base:old:1")
    assert name not in [model.id for model in sdk.models.list()]
    for ask in (sdk.models.retrieve, sdk.models.delete):
        with pytest.raises(openai.NotFoundError):
            ask(name)
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(model=name, messages=[{"role": "user", "content": "a"}])
    assert _refused(sdk, rows, model=name).status_code == 404


def test_result_files_have_their_own_purpose(sdk: openai.OpenAI, stores: Stores) -> None:
    """They are listed and read like any other file."""
    with stores.files.begin(
        owner=OWNER, filename="comparison.jsonl", purpose="fine-tune-results"
    ) as writer:
        writer.write(json.dumps({"question": "?"}).encode())
        record = writer.commit()
    [listed] = sdk.files.list(purpose="fine-tune-results").data
    assert (listed.id, listed.purpose) == (record.id, "fine-tune-results")
    answer = sdk.files.content(record.id)
    assert json.loads(answer.read()) == {"question": "?"}
