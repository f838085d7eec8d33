"""Identifiers: a prefix that says what the thing is, then its birth in milliseconds, then chance.

The time part makes ids sort by age; the 52 random bits make them hard enough to guess that an id
leaks nothing (ownership is checked as well).
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time

_SAFE = re.compile(r"[A-Za-z]+[-_][A-Za-z0-9]{1,64}")


def new_id(prefix: str) -> str:
    """A new id such as ``batch_019a3c…``, 24 digits; ``prefix`` includes its own separator."""
    return f"{prefix}{int(time.time() * 1000):011x}{secrets.token_hex(7)[:13]}"


def derived_id(prefix: str, *parts: str) -> str:
    """The same id for the same parts, so that a step done twice names the same thing."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{prefix}{digest[:24]}"


def is_id(text: str, prefix: str) -> bool:
    """Whether ``text`` could be an id with this prefix, and is safe as a file name."""
    return text.startswith(prefix) and _SAFE.fullmatch(text) is not None
