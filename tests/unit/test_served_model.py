"""One model's life on a node, moved on by hand; its engine is a small process of ours."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from shared.models import ModelRecord
from shared.settings import ServeSettings
from workers.inference.engines.standby import Standby
from workers.placement import Placement, Seat
from workers.processes import Child, Program
from workers.served_model import ServedModel, Stage, Surroundings

LIMIT_S = 30.0


def broken(folder: Path) -> ServedModel:
    """A model on demand whose engine says at once that it cannot load."""
    entry = ServeSettings(model="m", load="on_demand")

    def make_child(entry: ServeSettings, seat: Seat, record: ModelRecord) -> Child:
        command = (sys.executable, "-c", "import sys; sys.exit(3)")
        return Child(Program("engine", command, folder / "engine.log"))

    around = Surroundings(
        make_child=make_child,
        may_load=lambda _entry, _seat: True,
        loan=lambda _entry, _seat: None,
        has_room=lambda _: True,
        in_hand=lambda _: False,
        say=lambda _: None,
        give_work_s=1.0,
    )
    record = ModelRecord("m", None, "echo", trust_remote_code=False, created=0, owned_by="local")
    return ServedModel(Placement(entry, (Seat(0),)), record, around, Standby(folder, "m"))


def test_a_model_that_failed_to_load_may_be_asked_for_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only chats may want it: refused for ever, it would never be tried again."""
    model = broken(tmp_path)
    model._retry_s = 3600.0  # longer than any test
    model.load()
    ends_at = time.monotonic() + LIMIT_S
    while model.stage is not Stage.UNLOADED and time.monotonic() < ends_at:
        model.tick()
        time.sleep(0.01)
    assert model.trouble
    assert not model.obtainable
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert model.may_load
    assert model.obtainable
