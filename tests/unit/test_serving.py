"""What a node serves, from its settings and the registry: one table, no processes."""

from __future__ import annotations

from typing import Any

import msgspec

from shared.models import ModelDefaults, ModelRecord
from shared.settings import ServeSettings
from workers.serving import Served, own_entries, serve_now


def record(name: str, *, base: str | None = None, engine: str | None = "echo") -> ModelRecord:
    """A linked model."""
    return ModelRecord(
        name,
        None,
        engine,
        trust_remote_code=False,
        created=1,
        owned_by="local",
        base=base,
        job=None if base is None else "ftjob-1",
    )


def registry(*records: ModelRecord) -> dict[str, ModelRecord]:
    """Records by name."""
    return {one.name: one for one in records}


def entry(model: str, **fields: Any) -> ServeSettings:
    """One table of ``node.serve``."""
    return ServeSettings(model=model, engine="echo", **fields)


def loads(served: dict[str, Served]) -> dict[str, str]:
    """When each model is loaded."""
    return {name: one.entry.load for name, one in served.items()}


def test_without_node_serve_everything_linked_is_served_with_its_engine() -> None:
    """Also what is linked later; without an engine it is the default one."""
    served = serve_now((), registry(record("a"), record("b", engine=None)))
    assert {name: one.entry.engine for name, one in served.items()} == {
        "a": "echo",
        "b": "transformers",
    }


def test_with_node_serve_only_what_it_names_is() -> None:
    """A model that is linked beside is for other nodes, and one that was removed is not served."""
    served = serve_now((entry("a"), entry("gone")), registry(record("a"), record("b")))
    assert list(served) == ["a"]


def test_a_tuned_model_is_served_as_its_base_is_on_demand() -> None:
    """The base's whole entry counts, whatever engine the tuned model was linked with."""
    base = entry("a", gpus=("0",), memory_share=0.3, replicas=2, options={"words": 3})
    served = serve_now((base,), registry(record("a"), record("ft:a::1", base="a", engine=None)))
    tuned = served["ft:a::1"]
    assert tuned.entry == base.model_copy(update={"model": "ft:a::1", "load": "on_demand"})
    assert (tuned.root, tuned.tuned, tuned.eager) == ("a", True, False)
    assert tuned.build.engine == "echo"


def test_a_model_tuned_from_a_tuned_one_follows_the_first_base() -> None:
    """However long the way is."""
    records = registry(record("a"), record("b", base="a"), record("c", base="b"))
    assert serve_now((entry("a"),), records)["c"].root == "a"


def test_a_tuned_model_outlives_its_base() -> None:
    """It is a whole model: the entry of node.serve goes on to count, or else its own engine."""
    tuned = record("b", base="a")
    assert list(serve_now((entry("a"),), registry(tuned))) == ["b"]
    assert list(serve_now((), registry(tuned))) == ["b"]


def test_a_tuned_model_of_a_base_that_is_not_served_here_is_not_either() -> None:
    """Another node serves both."""
    records = registry(record("a"), record("b", base="a"), record("other"))
    assert list(serve_now((entry("other"),), records)) == ["other"]


def test_records_that_name_each_other_as_base_are_not_followed_for_ever() -> None:
    """Nobody writes such records; a node must not hang on them."""
    assert serve_now((), registry(record("a", base="b"), record("b", base="a"))) == {}


def test_an_entry_of_its_own_goes_before_the_base() -> None:
    """Who names a tuned model in node.serve means it."""
    own = entry("b", gpus=("1",))
    records = registry(record("a"), record("b", base="a"))
    assert serve_now((entry("a"), own), records)["b"] == Served(own, records["b"], "b", eager=True)


def test_a_base_makes_room_only_if_there_is_none_for_both() -> None:
    """By the shares of what is always loaded, on each GPU of the tuned model."""
    records = registry(record("a"), record("b", base="a"))
    roomy = entry("a", gpus=("0",), memory_share=0.5)
    tight = entry("a", gpus=("0",))
    assert loads(serve_now((roomy,), records)) == {"a": "always", "b": "on_demand"}
    assert loads(serve_now((tight,), records)) == {"a": "on_demand", "b": "on_demand"}
    assert serve_now((tight,), records)["a"].eager
    assert loads(serve_now((tight,), registry(record("a")))) == {"a": "always"}


def test_only_the_base_makes_room_not_its_neighbours() -> None:
    """What was promised to other models is kept."""
    serve = (entry("a", gpus=("0",), memory_share=0.6), entry("n", gpus=("0",), memory_share=0.4))
    records = registry(record("a"), record("n"), record("b", base="a"))
    assert loads(serve_now(serve, records)) == {"a": "on_demand", "n": "always", "b": "on_demand"}


def test_without_gpus_there_is_always_room() -> None:
    """Engines on the processor share its memory as the system lets them."""
    records = registry(record("a"), record("b", base="a"))
    assert loads(serve_now((), records)) == {"a": "always", "b": "on_demand"}


def test_publishing_a_candidate_changes_nothing_for_its_engines() -> None:
    """Nor does who may see it, or its defaults; a revision, a path or another engine does."""
    candidate = msgspec.structs.replace(record("b", base="a"), candidate=True, visible_to="me")
    published = msgspec.structs.replace(
        candidate, candidate=False, visible_to=None, defaults=ModelDefaults(temperature=0)
    )

    def build(found: ModelRecord, engine: str = "echo") -> ModelRecord:
        serve = (ServeSettings(model="a", engine=engine),)
        return serve_now(serve, registry(found))["b"].build

    assert build(candidate) == build(published)
    for changed in (
        msgspec.structs.replace(published, revision=2),
        msgspec.structs.replace(published, path="/elsewhere"),
        msgspec.structs.replace(published, trust_remote_code=True),
    ):
        assert build(changed) != build(published)
    assert build(published, "transformers") != build(published)


def test_the_entries_a_node_starts_with_leave_tuned_models_out() -> None:
    """They follow others, so they neither have to fit at start nor count among the replicas."""
    records = registry(record("a"), record("b", base="a"))
    assert [one.model for one in own_entries((), records)] == ["a"]
    assert own_entries((entry("x"),), records) == (entry("x"),)
