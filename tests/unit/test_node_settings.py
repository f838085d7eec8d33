"""From configuration to programs: snapshots, the example files, what gets served."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import ConfigurationError
from shared.models import ModelRecord, ModelRegistry
from shared.settings import Settings, load_settings, snapshot, with_overrides
from shared.storage import Layout, write_json
from tests.checkpoints import write_checkpoint
from workers import serving
from workers.node import Programs, place_models
from workers.placement import Seat
from workers.serving import choose_models, engine_spec

MODELS_OF_EIGHT = ("internvl2-2b", "internvl2-8b")
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("node.*.toml"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings that keep to a temporary folder."""
    return load_settings(None, storage={"data_dir": tmp_path / "data"})


@pytest.fixture
def registry(settings: Settings) -> ModelRegistry:
    """An empty registry."""
    layout = Layout(settings.data_dir)
    layout.create()
    return ModelRegistry(layout)


def test_there_are_four_example_files() -> None:
    """One CPU, one GPU, eight GPUs, several machines."""
    assert [path.name for path in CONFIGS] == [
        "node.8gpu.toml",
        "node.cpu.toml",
        "node.gpu.toml",
        "node.multi.toml",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_an_example_file_loads(path: Path) -> None:
    """Every key of every example is a setting, and it serves something."""
    assert load_settings(path).node.serve


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_an_example_file_fits_its_machine(path: Path) -> None:
    """Its models have room on the GPUs that it names."""
    serve = load_settings(path).node.serve
    record = ModelRecord("any", None, None, False, 0, "vlmq")
    placed = place_models(serve, {entry.model: record for entry in serve})
    assert all(placement.seats for placement in placed)


def test_an_example_gives_each_replica_its_own_gpu(tmp_path: Path) -> None:
    """Given the eight GPU example, then replicas 0 to 6 see GPUs 0 to 6."""
    example = load_settings(CONFIGS[0])
    settings = with_overrides(example, storage={"run_dir": tmp_path})
    programs = Programs(settings, tmp_path / "settings.json")
    entry = settings.node.serve[0]
    record = ModelRecord(entry.model, None, None, False, 0, "vlmq")
    [placement, _] = place_models(settings.node.serve, dict.fromkeys(MODELS_OF_EIGHT, record))
    pinned = [
        programs.engine(entry, seat, record).environment["CUDA_VISIBLE_DEVICES"]
        for seat in placement.seats
    ]
    assert pinned == ["0", "1", "2", "3", "4", "5", "6"]


def test_an_engine_without_gpus_keeps_the_environment(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``gpus`` the node does not decide what the engine sees."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    settings = with_overrides(
        settings, storage={"run_dir": tmp_path}, node={"serve": [{"model": "m"}]}
    )
    record = ModelRecord("m", None, None, False, 0, "vlmq")
    programs = Programs(settings, tmp_path / "s.json")
    program = programs.engine(settings.node.serve[0], Seat(0), record)
    assert "CUDA_VISIBLE_DEVICES" not in program.environment
    assert "GOMP_SPINCOUNT" in program.environment


def test_a_snapshot_is_the_same_tree(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a snapshot, when the environment changes afterwards, then it still says the same."""
    chosen = with_overrides(
        settings,
        api={"port": 9001},
        node={"serve": [{"model": "m", "gpus": ["0,1"], "options": {"delay_s": 0.5}}]},
    )
    path = tmp_path / "settings.json"
    write_json(path, snapshot(chosen))
    monkeypatch.setenv("VLMQ_API__PORT", "9002")
    read = load_settings(path)
    assert read.api.port == 9001
    assert read.node.serve == chosen.node.serve
    assert read.run_dir == chosen.run_dir
    assert snapshot(read) == snapshot(chosen)


def test_the_command_line_wins_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a port in the environment, when another is given by hand, that one counts."""
    monkeypatch.setenv("VLMQ_API__PORT", "9002")
    settings = load_settings(None, storage={"data_dir": tmp_path})
    assert settings.api.port == 9002
    assert with_overrides(settings, api={"port": 9003}).api.port == 9003


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "[api]\nprot = 1\n", "api.prot"),
        ("a.toml", "[api\n", "not valid TOML"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[]", "does not hold a table"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, name: str, text: str, said: str) -> None:
    """A configuration that cannot be meant names the file and the place."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=said) as caught:
        load_settings(path)
    assert str(path) in caught.value.message


def test_the_bundled_model_is_linked_when_there_is_none(
    settings: Settings,
    registry: ModelRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Given nothing linked, when a node starts, then it serves the tiny model, greedily."""
    monkeypatch.setattr(serving, "TINY_CHECKPOINT", write_checkpoint(tmp_path / "tiny"))
    monkeypatch.setattr(serving, "_TRANSFORMERS_NEEDS", ("json",))
    told: list[str] = []
    (entry,) = choose_models(settings, registry, told.append)
    assert (entry.model, entry.engine) == ("tiny-internvl2", "transformers")
    assert registry.get("tiny-internvl2").defaults.temperature == 0
    assert len(told) == 1
    assert choose_models(settings, registry, told.append) == (entry,)
    assert len(told) == 1, "the second start links nothing"


def test_a_missing_library_is_said_with_what_to_do(
    settings: Settings, registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torch the message names the extra to install and the way without."""
    monkeypatch.setattr(serving, "_TRANSFORMERS_NEEDS", ("no_such_library",))
    with pytest.raises(ConfigurationError, match=r"vlmq\[cpu\].*--engine echo"):
        choose_models(settings, registry, lambda _: None)
    assert registry.list() == []


def test_every_linked_model_is_served_with_its_engine(
    settings: Settings, registry: ModelRegistry, tmp_path: Path
) -> None:
    """Without node.serve, each record's engine is used, transformers when it names none."""
    registry.link("a", write_checkpoint(tmp_path / "a"))
    registry.link("b", None, engine="echo")
    chosen = choose_models(settings, registry, lambda _: None)
    assert [(entry.model, entry.engine) for entry in chosen] == [
        ("a", "transformers"),
        ("b", "echo"),
    ]


def test_an_unlinked_model_is_refused_with_the_command_that_links_it(
    settings: Settings, registry: ModelRegistry
) -> None:
    """Naming a model that nobody linked is an error, except for echo."""
    lost = with_overrides(settings, node={"serve": [{"model": "lost"}]})
    with pytest.raises(ConfigurationError, match="vlmq models link lost"):
        choose_models(lost, registry, lambda _: None)
    echo = with_overrides(settings, node={"serve": [{"model": "e", "engine": "echo"}]})
    choose_models(echo, registry, lambda _: None)
    assert registry.get("e").path is None


def test_an_engine_is_told_what_was_consented_to(
    settings: Settings, registry: ModelRegistry, tmp_path: Path
) -> None:
    """Consent to remote code travels from the link to the engine, as do the limits."""
    record = registry.link("a", write_checkpoint(tmp_path / "a"), trust_remote_code=True)
    entry = with_overrides(
        settings, node={"serve": [{"model": "a", "session_len": 512, "max_running": 3}]}
    ).node.serve[0]
    spec = engine_spec(entry, record)
    assert (spec.trust_remote_code, spec.session_len, spec.max_running) == (True, 512, 3)
    assert spec.path == str(tmp_path / "a")
