"""Loading a checkpoint folder: what is refused, what is broken, and what one is told to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from shared.checkpoints import own_code
from shared.errors import EngineSetupFailed, RemoteCodeRefused
from workers.inference.internvl.export import export_with_code
from workers.inference.internvl.load import Loaded, load
from workers.inference.tiny import CHECKPOINT


def _load(folder: Path, *, consent: bool = False) -> Loaded:
    return load(folder, trust_remote_code=consent, device=torch.device("cpu"), dtype=None)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to break."""
    return shutil.copytree(CHECKPOINT, tmp_path / "model")


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_projects_checkpoint_needs_no_consent() -> None:
    """It carries no code, is small, and its answers end at the turn's end."""
    assert own_code(CHECKPOINT) is None
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 2_000_000
    loaded = _load(CHECKPOINT)
    assert loaded.vocabulary.control("<|im_end|>") in loaded.ends


def test_a_python_file_is_refused_unless_consented_and_never_imported(
    copy: Path, tmp_path: Path
) -> None:
    """The refusal names the file and the flag; the file has not run."""
    mark = tmp_path / "it_ran"
    export_with_code(CHECKPOINT, tmp_path / "coded")
    bait = tmp_path / "coded" / "modeling_internvl_chat.py"
    bait.write_text(f"open({str(mark)!r}, 'w').close()\n" + bait.read_text())
    with pytest.raises(RemoteCodeRefused, match=r"config\.py.*--trust-remote-code"):
        _load(tmp_path / "coded")
    assert not mark.exists()
    (copy / "helper.py").write_text("")
    with pytest.raises(RemoteCodeRefused, match=r"helper\.py"):
        _load(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_an_auto_map_is_code_too(copy: Path, name: str) -> None:
    """Code that would be fetched from elsewhere is refused as well."""
    _edit(copy / name, auto_map={"AutoModel": "someone/else--modeling.Model"})
    with pytest.raises(RemoteCodeRefused, match=name):
        _load(copy)


def test_an_auto_map_deep_inside_is_found(copy: Path) -> None:
    """Published configs have one in their parts."""
    config = json.loads((copy / "config.json").read_text())
    config["llm_config"]["auto_map"] = {"AutoConfig": "configuration_internlm2.InternLM2Config"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RemoteCodeRefused, match=r"config\.json"):
        _load(copy)


def test_with_consent_the_folders_own_code_runs(tmp_path: Path) -> None:
    """Consent runs what the folder says, not the built-in network."""
    mark = tmp_path / "it_ran"
    export_with_code(CHECKPOINT, tmp_path / "consented")
    code = tmp_path / "consented" / "modeling_internvl_chat.py"
    text = code.read_text().replace(
        "\n\nPast = ", f"\n\nopen({str(mark)!r}, 'w').close()\nPast = ", 1
    )
    code.write_text(text)
    _load(tmp_path / "consented", consent=True)
    assert mark.exists()


def test_code_that_fails_is_a_failed_setup(tmp_path: Path) -> None:
    """What the folder's code raises is told, as the engine's failure to set up."""
    export_with_code(CHECKPOINT, tmp_path / "faulty")
    code = tmp_path / "faulty" / "modeling_internvl_chat.py"
    code.write_text(code.read_text() + "\nraise ZeroDivisionError('its own fault')\n")
    with pytest.raises(EngineSetupFailed, match="ZeroDivisionError: its own fault"):
        _load(tmp_path / "faulty", consent=True)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
        ("tokenizer.json", "tokenizer.json"),
    ],
)
def test_a_missing_file_is_named(copy: Path, name: str, told: str) -> None:
    """Setup fails and says which file is not there."""
    (copy / name).unlink()
    with pytest.raises(EngineSetupFailed, match=told):
        _load(copy)


def test_no_folder_at_all_is_told(tmp_path: Path) -> None:
    """The path is in the message."""
    with pytest.raises(EngineSetupFailed, match="nowhere"):
        _load(tmp_path / "nowhere")


def test_cut_weights_are_told_from_missing_ones(copy: Path) -> None:
    """A file that a copy cut short."""
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(EngineSetupFailed, match="damaged or cut short"):
        _load(copy)


def test_missing_tensors_are_counted_and_named(copy: Path) -> None:
    """A config of more layers than the weights have fails, and so does one of fewer."""
    config = json.loads((copy / "config.json").read_text())
    config["llm_config"]["num_hidden_layers"] = 4
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineSetupFailed, match=r"7 of 69 .*layers\.3"):
        _load(copy)
    config["llm_config"]["num_hidden_layers"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineSetupFailed, match="not part of the model"):
        _load(copy)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["LlavaForConditionalGeneration"]}, "InternVLChatModel"),
        ({"vision_config": None}, "vision_config"),
        ({"force_image_size": 448}, "force_image_size"),
    ],
)
def test_a_config_of_another_kind_is_refused(
    copy: Path, changes: dict[str, object], told: str
) -> None:
    """With what was found or expected."""
    _edit(copy / "config.json", **changes)
    with pytest.raises(EngineSetupFailed, match=told):
        _load(copy)


def test_an_index_may_not_reach_out_of_its_folder(copy: Path) -> None:
    """Shards are files of the folder."""
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}})
    )
    with pytest.raises(EngineSetupFailed, match="outside the folder"):
        _load(copy)
