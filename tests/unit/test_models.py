"""The registry of models."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from shared.errors import CheckpointInvalid, InvalidValue, ModelNotFound, StorageFailed
from shared.models import ModelDefaults, ModelRecord, ModelRegistry, ModelSource
from shared.storage import Layout
from tests.checkpoints import write_checkpoint


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Where records are."""
    found = Layout(tmp_path / "data")
    found.create()
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that could be a checkpoint."""
    return write_checkpoint(tmp_path / "checkpoint")


def test_a_linked_model_is_known_to_all(layout: Layout, checkpoint: Path) -> None:
    """On what terms, too."""
    record = ModelRegistry(layout).link(
        "m", checkpoint, trust_remote_code=True, defaults=ModelDefaults(max_tokens=7)
    )
    assert ModelRegistry(layout).get("m") == record
    assert ModelRegistry(layout).list() == [record]
    assert (record.path, record.trust_remote_code) == (str(checkpoint), True)
    assert record.defaults.max_tokens == 7


def test_every_change_is_a_new_revision(layout: Layout, checkpoint: Path) -> None:
    """Nodes know by it that they have to load the model anew."""
    registry = ModelRegistry(layout)
    assert registry.link("m", None).revision == 1
    assert registry.link("m", checkpoint, replace=True).revision == 2
    reloaded = registry.reload("m")
    assert (reloaded.revision, reloaded.path) == (3, str(checkpoint))
    assert ModelRegistry(layout).get("m") == reloaded
    with pytest.raises(ModelNotFound):
        registry.reload("nobody")


def test_publishing_a_candidate_is_no_new_revision(layout: Layout) -> None:
    """Its engines are loaded already; who may see it is as it was linked."""
    registry = ModelRegistry(layout)
    candidate = registry.link("ft:m::1", None, base="m", job="j", candidate=True, visible_to="me")
    assert (candidate.base, candidate.job, candidate.candidate) == ("m", "j", True)
    published = registry.publish("ft:m::1")
    assert published == msgspec.structs.replace(candidate, candidate=False)
    assert ModelRegistry(layout).get("ft:m::1") == published
    with pytest.raises(ModelNotFound):
        registry.publish("nobody")


def test_what_was_tuned_from_a_removed_model_follows_that_ones_base(layout: Layout) -> None:
    """Or nobody would know any more where it is to be served."""
    registry = ModelRegistry(layout)
    registry.link("m", None)
    registry.link("first", None, base="m")
    registry.link("second", None, base="first")
    registry.remove("first")
    assert registry.get("second").base == "m"
    registry.remove("m")
    assert registry.get("second").base == "m", "a model without a base leaves nothing to follow"


def test_a_model_linked_by_another_program_is_known_at_once(layout: Layout) -> None:
    """Though what is known of the others is a second old."""
    reader = ModelRegistry(layout)
    assert not reader.knows("m", "me")
    ModelRegistry(layout).link("m", None)
    assert reader.get("m").name == "m"
    assert reader.knows("m", "me")


def test_a_missing_disk_is_not_an_empty_registry(layout: Layout) -> None:
    """Programs that drop what is missing must not drop everything."""
    registry = ModelRegistry(layout)
    registry.link("m", None)
    assert list(registry.by_name()) == ["m"]
    layout.models.rename(layout.models.with_name("elsewhere"))
    with pytest.raises(StorageFailed, match="mounted"):
        registry.by_name()


@pytest.mark.parametrize("name", ["a/b", "ft:base:suffix:id", "Org/Model-1.5_x@rev+q", "x" * 128])
def test_names_may_look_like_paths(layout: Layout, name: str) -> None:
    """Each has one file, directly in the folder."""
    registry = ModelRegistry(layout)
    registry.link(name, None)
    assert [path.parent for path in layout.models.iterdir()] == [layout.models]
    assert registry.get(name).name == name
    registry.remove(name)
    assert registry.list() == []


@pytest.mark.parametrize(
    "name", ["", "/a", "../a", "a/../b", "a b", "a|b", "-a", "ä", "a\n", "x" * 129]
)
def test_other_names_are_refused(layout: Layout, name: str) -> None:
    """They become names of files and queues."""
    with pytest.raises(InvalidValue) as refused:
        ModelRegistry(layout).link(name, None)
    assert refused.value.param == "name"


def test_a_name_is_linked_once(layout: Layout, checkpoint: Path) -> None:
    """Unless it is replaced on purpose."""
    registry = ModelRegistry(layout)
    registry.link("m", None)
    with pytest.raises(InvalidValue):
        registry.link("m", checkpoint)
    registry.link("m", checkpoint, replace=True)
    assert registry.get("m").path == str(checkpoint)


def test_a_folder_that_is_no_checkpoint_is_refused(layout: Layout, tmp_path: Path) -> None:
    """With what is missing."""
    with pytest.raises(InvalidValue, match="not a folder"):
        ModelRegistry(layout).link("m", tmp_path / "none")
    for engine in (None, "lmdeploy", "mine:Engine"):
        with pytest.raises(CheckpointInvalid, match=r"config\.json"):
            ModelRegistry(layout).link("m", tmp_path, engine=engine)
    assert ModelRegistry(layout).list() == []


def test_a_folder_with_a_file_cut_short_is_refused(layout: Layout, checkpoint: Path) -> None:
    """Unless the engine is one's own, which may keep other files."""
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointInvalid, match=r"model\.safetensors is damaged or cut short"):
        ModelRegistry(layout).link("m", checkpoint)
    ModelRegistry(layout).link("m", checkpoint, engine="mine:Engine")


def test_where_a_model_came_from_is_recorded(layout: Layout, checkpoint: Path) -> None:
    """And records that were written before that was known are still read."""
    source = ModelSource("https://hub.example", "org/model", "c" * 40)
    ModelRegistry(layout).link("m", checkpoint, source=source)
    assert ModelRegistry(layout).get("m").source == source
    path = layout.models / "m.json"
    old = msgspec.json.decode(path.read_bytes())
    del old["source"]
    path.write_bytes(msgspec.json.encode(old))
    record: ModelRecord = ModelRegistry(layout).get("m")
    assert record.source is None


def test_a_removed_model_is_gone_and_its_folder_is_not(layout: Layout, checkpoint: Path) -> None:
    """Removing twice is an error."""
    registry = ModelRegistry(layout)
    registry.link("m", checkpoint)
    registry.get("m")
    registry.remove("m")
    for step in (registry.get, registry.remove):
        with pytest.raises(ModelNotFound):
            step("m")
    assert (checkpoint / "config.json").exists()


def test_a_damaged_record_is_said_to_be(layout: Layout) -> None:
    """By its path."""
    (layout.models / "m.json").write_text('{"name": 5}')
    with pytest.raises(StorageFailed, match=r"m\.json"):
        ModelRegistry(layout).list()
