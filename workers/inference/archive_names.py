"""Names of members of archives: their text, and whether they name anything inside a folder."""

from __future__ import annotations

import re

from shared.errors import EntryRefused
from workers.inference.image_files import shown

_MAX_NAME = 4096
_PLAIN = re.compile(r"[^./\\\0][^/\\\0]{0,250}")


def decode_name(raw: bytes) -> str:
    """The text of a name: UTF-8, else the Chinese encoding that many programs write, else Latin 1."""
    for encoding in ("utf-8", "gb18030"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1")


def plain_name(name: str) -> str:
    """The name without empty parts and dots. Raises: EntryRefused saying why it names nothing."""
    if _PLAIN.fullmatch(name):
        return name  # as most are
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if name.startswith("/") or name[1:3] in {":/", ":\\"}:
        raise EntryRefused(f"{shown(name)} is an absolute path, which no archive may hold")
    if ".." in parts:
        raise EntryRefused(f"{shown(name)} leads out of the archive")
    if not parts or "\0" in name or len(name) > _MAX_NAME:
        raise EntryRefused(f"{shown(name)} is no name of a file")
    return "/".join(parts)


def split_key(name: str) -> tuple[str, str]:
    """A name's key and kind, as webdataset has it: ``a/b.c.jpg`` is ``a/b`` and ``c.jpg``."""
    at = name.find(".", name.rfind("/") + 1)
    return (name, "") if at < 0 else (name[:at], name[at + 1 :])
