"""The tiny model: what it sees (``scenes``), what it learned from (``lesson``), its checkpoint.

The checkpoint is the result of a fine-tune of ``untrained`` by vlmq itself; README.md, "Working on
it", has the commands.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
