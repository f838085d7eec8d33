"""What xtuner and DeepSpeed need around them before they are imported.

Nothing here changes how anything is computed; it takes away what is slow, missing or in the way.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

from shared.process import free_port


def prepare_environment(cache_dir: Path, *, modules: Path | None = None) -> None:
    """Set the variables that libraries read when they are imported; what is set already stays.

    ``modules`` is a folder of this job alone; ``cache_dir`` may be common to many.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_dir / "torch_extensions"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir / "triton"))
    # Checkpoints of ours hold more than tensors, and nobody else's are loaded.
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # transformers copies a checkpoint's code here, below the last part of the checkpoint's path. In
    # a common folder two jobs, or two processes of one, would write each other's modules.
    place = (modules or cache_dir / "modules") / os.environ.get("RANK", "0")
    os.environ.setdefault("HF_MODULES_CACHE", str(place))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")


def single_process_group() -> None:
    """Be a process group of one with a port of its own; DeepSpeed's fixed one allows one job."""
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )


def prepare_imports() -> None:
    """Make torchvision importable beside a CPU build of torch, and leave out what nothing uses."""
    from workers.inference.internvl.vision_ops import provide_vision_ops

    if "datasets" not in sys.modules:
        _leave_out("datasets")  # half a second, for data sets that are not used here
    provide_vision_ops()


def attend_without_flash() -> None:
    """Let Phi-3's code choose its attention where flash-attn is not installed.

    xtuner asks it for flash-attn's whether that is there or not, and transformers then refuses to make
    the model. Published code that looks for itself is left as it is.
    """
    from transformers.utils import is_flash_attn_2_available
    from xtuner.model import internvl

    if not is_flash_attn_2_available():
        internvl.AutoModel = _AnyAttention


def has_gpu() -> bool:
    """Whether torch sees a GPU here."""
    import torch

    return torch.cuda.is_available()


def skip_compiling() -> None:
    """Keep DeepSpeed from compiling its shared-memory operation for processes on one machine.

    It takes g++, ninja and half a minute, and only speeds up small reductions between processes on
    a CPU; without it torch's own are used.
    """
    from deepspeed.git_version_info import compatible_ops

    compatible_ops["deepspeed_shm_comm"] = False


def _leave_out(name: str) -> None:
    """Put an empty module in the place of a library; whoever calls something of it gets an error."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def stand_in(attribute: str) -> type:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return type(attribute, (_LeftOut,), {})

    module.__getattr__ = stand_in  # type: ignore[method-assign]
    sys.modules[name] = module


class _AnyAttention:
    """In the place of xtuner's ``AutoModel``."""

    @staticmethod
    def from_pretrained(path: str, *, config: Any, **given: Any) -> Any:
        from transformers import AutoModel

        config.llm_config._attn_implementation = None  # noqa: SLF001 - what xtuner has set
        return AutoModel.from_pretrained(path, config=config, **given)


class _LeftOut:
    def __init__(self, *given: Any, **named: Any) -> None:
        _refuse(type(self).__name__)


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name} was left out to start faster; a configuration that uses it cannot run here"
    )
