"""In which script a text is written, and whether that suits a language.

Scripts tell languages apart only where these use different ones: Chinese from English, not English
from German.
"""

from __future__ import annotations

import re
from functools import lru_cache

from shared.errors import InvalidValue

_RANGES = {
    "latin": "A-Za-zªºÀ-ÖØ-öø-ɏ\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua787\uff21-\uff3a\uff41-\uff5a",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "cyrillic": "\u0400-\u052f\u1c80-\u1c8f",
    "armenian": "\u0530-\u058f",
    "hebrew": "\u0590-\u05ff\ufb1d-\ufb4f",
    "arabic": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufeff",
    "devanagari": "\u0900-\u097f",
    "bengali": "\u0980-\u09ff",
    "gurmukhi": "\u0a00-\u0a7f",
    "gujarati": "\u0a80-\u0aff",
    "tamil": "\u0b80-\u0bff",
    "telugu": "\u0c00-\u0c7f",
    "kannada": "\u0c80-\u0cff",
    "malayalam": "\u0d00-\u0d7f",
    "sinhala": "\u0d80-\u0dff",
    "thai": "\u0e00-\u0e7f",
    "lao": "\u0e80-\u0eff",
    "burmese": "\u1000-\u109f",
    "georgian": "\u10a0-\u10ff\u1c90-\u1cbf",
    "ethiopic": "\u1200-\u137f",
    "khmer": "\u1780-\u17ff",
    "hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3",
    "kana": "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "han": "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af",
}
_LATIN = (
    "af az bs ca cs cy da de en es et eu fi fr ga gl hr hu id is it lt lv ms mt nl no pl pt ro sk sl sq "
    "sv sw tl tr uz vi"
)
_SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_LATIN.split(), ("latin",)),
    **dict.fromkeys(["be", "bg", "kk", "ky", "mk", "mn", "ru", "tg", "uk"], ("cyrillic",)),
    **dict.fromkeys(["ar", "fa", "ps", "ur"], ("arabic",)),
    **dict.fromkeys(["hi", "mr", "ne"], ("devanagari",)),
    "sr": ("cyrillic", "latin"),
    "el": ("greek",),
    "hy": ("armenian",),
    "he": ("hebrew",),
    "bn": ("bengali",),
    "pa": ("gurmukhi",),
    "gu": ("gujarati",),
    "ta": ("tamil",),
    "te": ("telugu",),
    "kn": ("kannada",),
    "ml": ("malayalam",),
    "si": ("sinhala",),
    "th": ("thai",),
    "lo": ("lao",),
    "my": ("burmese",),
    "ka": ("georgian",),
    "am": ("ethiopic",),
    "km": ("khmer",),
    "ko": ("hangul",),
    "ja": ("kana", "han"),
    "zh": ("han",),
}
LANGUAGES = tuple(sorted(_SCRIPTS))
"""The codes of the languages whose script is known."""

_LETTER = re.compile(r"[^\W\d_]")
_DENSE = ("han", "kana", "hangul")
_DENSE_WEIGHT = 3
"""A character of these scripts says about what three letters of others do."""
_ENOUGH = 0.5
"""The share of a text that its language's script must have; the rest may be names and numbers."""
_KANA_FROM = 12
"""So many Han characters without any kana are no Japanese sentence."""
_KANA_SHARE = 0.4
"""More kana than this in Chinese is Japanese."""


def language_code(text: str) -> str:
    """The code that a language tag such as ``zh-CN`` begins with.

    Raises: InvalidValue for ``quality.language``.
    """
    code = re.split("[-_]", text.lower(), maxsplit=1)[0]
    if code not in _SCRIPTS:
        raise InvalidValue(
            f"quality.language: the script of '{text}' is not known; name one of "
            f"{', '.join(LANGUAGES)}, or leave it out",
            param="quality.language",
        )
    return code


def is_written_as(text: str, language: str) -> bool:
    """Whether a text may be in the language with this code; true if it has no letters at all."""
    wanted = _SCRIPTS[language]
    if text.isascii():
        return "latin" in wanted or _LETTER.search(text) is None
    letters = "".join(_LETTER.findall(text))
    found = {name: _count(name, letters) for name in {*wanted, *_DENSE}}
    dense = sum(found[name] for name in _DENSE)
    total = len(letters) - dense + _DENSE_WEIGHT * dense
    right = sum(found[name] * (_DENSE_WEIGHT if name in _DENSE else 1) for name in wanted)
    if right < _ENOUGH * total:
        return False
    if language == "ja":
        return found["kana"] > 0 or found["han"] < _KANA_FROM
    return language != "zh" or found["kana"] <= _KANA_SHARE * len(letters)


def _count(script: str, letters: str) -> int:
    return len(_pattern(script).findall(letters))


@lru_cache(maxsize=len(_RANGES))
def _pattern(script: str) -> re.Pattern[str]:
    return re.compile(f"[{_RANGES[script]}]")
