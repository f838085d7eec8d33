"""Which training libraries an interpreter has, found out without importing any of them."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache

from shared.errors import ConfigurationError

REQUIRED = ("torch", "transformers", "xtuner", "deepspeed", "mmengine", "peft", "timm")
_RECORDED = (*REQUIRED, "torchvision", "vlmq")
_LIMIT_S = 60.0
_ASK = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def interpreter(python: str | None) -> str:
    """The program that training runs in: ``finetune.python``, or this one."""
    return python or sys.executable


@lru_cache(maxsize=4)
def versions(python: str) -> dict[str, str]:
    """The versions of training libraries that an interpreter has, and its own as ``python``.

    Raises: ConfigurationError if it is no interpreter.
    """
    try:
        asked = subprocess.run(
            [python, "-c", _ASK, *_RECORDED],
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=True,
        )
        found = json.loads(asked.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigurationError(
            f"finetune.python is {python}, which is no working Python: {error}"
        ) from None
    return {str(name): str(version) for name, version in found.items()}


def missing_libraries(python: str | None) -> list[str]:
    """The required libraries that the training interpreter lacks. Raises: ConfigurationError."""
    found = versions(interpreter(python))
    return [name for name in (*REQUIRED, "vlmq") if name not in found]
