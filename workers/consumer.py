"""The program of a Celery consumer: ``python -m workers.consumer batch|chat|finetune --config FILE``."""

from __future__ import annotations

import argparse
from pathlib import Path

from shared import log
from shared.process import die_with_parent
from shared.settings import load_settings
from workers.app import run_batch_consumer, run_chat_consumer, run_finetune_consumer

_RUN = {
    "batch": run_batch_consumer,
    "chat": run_chat_consumer,
    "finetune": run_finetune_consumer,
}


def main() -> None:
    """Run until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lane", choices=tuple(_RUN))
    parser.add_argument("--config", type=Path)
    arguments = parser.parse_args()
    die_with_parent()
    settings = load_settings(arguments.config)
    log.configure(f"{arguments.lane}-consumer", level=settings.log_level)
    _RUN[arguments.lane](settings)


if __name__ == "__main__":
    main()
