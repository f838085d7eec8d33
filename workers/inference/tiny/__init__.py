"""The tiny model: what it sees (``scenes``), how it was made (``train``), and its checkpoint."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
