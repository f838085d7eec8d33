"""The quality gate of a caption job: what is wrong with a caption, and how it is asked for again.

Everything here is a function of text and numbers. Who asks again is the consumer's
:mod:`workers.inference.gate`.
"""

from __future__ import annotations

import hashlib
import operator
import re
import unicodedata
from itertools import islice
from typing import Annotated, Literal

import msgspec

from shared.errors import InvalidValue
from shared.writing import is_written_as, language_code

Reason = Literal["empty", "refusing", "repeating", "wrong_language", "truncated"]

REASONS: tuple[Reason, ...] = ("empty", "refusing", "repeating", "wrong_language", "truncated")
"""From the worst to the mildest."""
MAX_RESAMPLES = 8


class QualityGate(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True
):
    """What a caption job asks of its captions.

    ``checks`` are those that are made (all of them without it; ``wrong_language`` only with
    ``language``). A caption that does not pass is asked for again up to ``resamples`` times;
    ``temperature`` is that of the first time, and what is left out is chosen.
    """

    checks: list[Reason] | None = None
    language: Annotated[str, msgspec.Meta(min_length=2, max_length=35)] | None = None
    resamples: Annotated[int, msgspec.Meta(ge=0, le=MAX_RESAMPLES)] = 2
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None

    def check(self) -> None:
        """Raise the rules that one field's type cannot say. Raises: InvalidValue."""
        if self.language is not None:
            language_code(self.language)
        if self.checks is None:
            return
        if not self.checks:
            raise InvalidValue(
                f"quality.checks: name some of {', '.join(REASONS)}, or leave it out for all",
                param="quality.checks",
            )
        if "wrong_language" in self.checks and self.language is None:
            raise InvalidValue(
                "quality.checks: 'wrong_language' needs 'language', such as 'en' or 'zh'",
                param="quality.language",
            )

    def judge(self, text: str, finish_reason: str) -> list[Reason]:
        """What is wrong with a caption, the worst first; empty if it passes."""
        if is_empty(text):
            return self._asked(["empty"])
        found: list[Reason] = []
        if is_refusal(text):
            found.append("refusing")
        if is_repeating(text):
            found.append("repeating")
        if self.language is not None and not is_written_as(text, language_code(self.language)):
            found.append("wrong_language")
        if finish_reason == "length":
            found.append("truncated")
        return self._asked(found)

    def _asked(self, found: list[Reason]) -> list[Reason]:
        if self.checks is None:
            return found
        return [reason for reason in found if reason in self.checks]


class Resampling(msgspec.Struct, frozen=True):
    """How a caption is asked for once more."""

    seed: int
    temperature: float
    top_k: int
    repetition_penalty: float


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an output line says of its caption.

    ``reasons`` are what is wrong with it, ``resampled`` what was wrong with each one that was thrown
    away, in the order of asking. ``seed`` and ``temperature`` are given if it is not the first.
    """

    verdict: Literal["pass", "review"]
    reasons: list[Reason] = []
    resampled: list[list[Reason]] = []
    seed: int | None = None
    temperature: float | None = None


def badness(reasons: list[Reason]) -> int:
    """A number that is higher for worse captions: one worse thing outweighs all milder ones."""
    return sum(1 << (len(REASONS) - 1 - REASONS.index(reason)) for reason in reasons)


def resampling(
    gate: QualityGate,
    reasons: list[Reason],
    *,
    attempt: int,
    key: str,
    seed: int | None,
    temperature: float,
    top_k: int,
    repetition_penalty: float,
) -> Resampling:
    """How to ask for the ``attempt``-th time again (from 1) after such ``reasons``.

    ``key`` tells the item from all others; ``seed`` to ``repetition_penalty`` are those of the first
    time. The seed follows from these, so that a chunk done again asks in the same way.
    """
    digest = hashlib.sha256(f"{seed}|{key}|{attempt}".encode()).digest()
    first = max(temperature, 0.6) if gate.temperature is None else gate.temperature
    loops = bool({"repeating", "truncated"} & set(reasons))
    return Resampling(
        seed=int.from_bytes(digest[:4], "big") >> 1,
        temperature=min(2.0, first + 0.2 * (attempt - 1)),
        top_k=40 if top_k == 1 else top_k,  # of one candidate the same comes again
        repetition_penalty=repetition_penalty + (0.05 * attempt if loops else 0.0),
    )


# --- nothing --------------------------------------------------------------------------------------

_READABLE = re.compile(r"[^\W_]")


def is_empty(text: str) -> bool:
    """Whether a text says nothing: no letter, digit or symbol, only space and punctuation."""
    if _READABLE.search(text):
        return False
    return not any(unicodedata.category(character) in ("So", "Sc", "Sm") for character in text)


# --- refusals -------------------------------------------------------------------------------------

_OPENING = 240
"""Characters in which a refusal shows; later ones may be quoted from the image."""
_CANNOT = r"(?:can(?:no|['’])?t|cannot|can not|could not|couldn['’]t|am not able|['’]m not able|am unable|['’]m unable|unable|won['’]t|will not|not comfortable)"
_DO = r"(?:assist|help|provide|describe|identify|recogni[sz]e|see|view|access|process|analy[sz]e|answer|fulfil+|comply|generate|create|determine|discuss|engage|caption|comment|interpret|display|open|read|do that|tell)"
_REFUSALS = (
    # English
    rf"(?:i['’]?m|i am|we['’]re|we are)?\s*(?:\w+ )?sorry\b.{{0,60}}?\b{_CANNOT}",
    rf"(?:i|we) (?:do |must |have to )?apologi[sz]e\b.{{0,60}}?\b{_CANNOT}",
    rf"(?:unfortunately,? |as much as .{{0,40}}, )?(?:i|we) ?{_CANNOT}(?: to)?(?: \w+ly)? {_DO}\b",
    r"as an? (?:\w+ )?(?:ai|artificial intelligence|language model|text-based)\b",
    r"(?:i|we) (?:do not|don['’]t) have the (?:ability|capability|capacity)\b",
    r"(?:i|we) (?:must|have to) (?:decline|refuse)\b",
    # Chinese
    r"(?:非常|很|十分|真的)?(?:抱歉|对不起|對不起|遗憾|遺憾|不好意思).{0,20}?(?:无法|無法|不能|没有办法|沒有辦法|没办法|不可以|不便|未能)",
    r"(?:我|本人|您好，我)(?:目前|暂时|暫時|现在)?(?:无法|無法|不能|没有办法|没办法|不便).{0,4}?(?:直接)?(?:查看|看到|看见|描述|识别|識別|辨认|提供|回答|协助|協助|帮助|幫助|处理|處理|分析|满足|滿足|完成|生成|访问|确定|確定|讨论)",
    r"作[为為](?:一[个個名款种])?(?:人工智能|人工智慧|AI|语言模型|大?模型|聊天机器人)",
    # Japanese
    r"(?:大変)?(?:申し訳(?:ありません|ございません|ないですが)|すみません|恐れ入りますが).{0,60}?(?:できません|できかね|ません。)",
    r"(?:私は|AIとして).{0,30}?(?:お答え|説明|識別|特定|お手伝い)(?:することは|することが|は)?(?:できません|できかねます)",
    # Korean
    r"(?:죄송합니다|죄송하지만|미안하지만|미안합니다).{0,60}?(?:수 없|없습니다|어렵습니다|못합니다)",
    # Spanish, Portuguese, Italian
    r"(?:lo siento|disculp[ae]|perd[oó]n).{0,40}?\bno (?:puedo|podemos|me es posible|soy capaz)",
    r"(?:desculpe|sinto muito|lamento|infelizmente).{0,40}?\bnão (?:posso|consigo|é possível|sou capaz)",
    r"(?:mi dispiace|purtroppo|spiacente).{0,40}?\bnon (?:posso|sono in grado|riesco|è possibile)",
    # French, German, Dutch
    r"(?:(?:je suis )?d[ée]sol[ée]e?|je regrette|malheureusement).{0,40}?\bne (?:peux|suis|puis|peut)\b",
    r"(?:(?:es )?tut mir leid|entschuldigung|leider|ich bedauere).{0,60}?\b(?:kann|darf|könnte) .{0,60}?\bnicht\b",
    r"(?:tut mir leid|leider).{0,40}?\bnicht (?:in der lage|möglich)",
    r"(?:het spijt me|sorry|helaas).{0,40}?\bkan .{0,40}?\b(?:niet|geen)\b",
    # Russian, Ukrainian
    r"(?:извините|простите|к сожалению|прошу прощения|вибачте|на жаль).{0,40}?\bне (?:могу|можу|в состоянии|имею возможности)",
    # Arabic, Hindi, Vietnamese
    r"(?:عذر[اًا]{1,2}|آسف|أعتذر|للأسف).{0,40}?(?:لا (?:أستطيع|يمكنني)|لست قادر)",
    r"(?:क्षमा करें|माफ़ करें|माफ करें|मुझे खेद है).{0,60}?(?:नहीं (?:कर|दे|बता)|असमर्थ)",
    r"(?:xin lỗi|rất tiếc).{0,40}?không thể",
)
_REFUSAL = re.compile(rf"\W*(?:{'|'.join(_REFUSALS)})", re.IGNORECASE | re.DOTALL)


def is_refusal(text: str) -> bool:
    """Whether a text begins by saying that its writer will not or cannot answer."""
    return _REFUSAL.match(text[:_OPENING]) is not None


# --- loops ----------------------------------------------------------------------------------------

_TOKENS = re.compile(
    "[\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f\U00020000-\U000323af]"
    r"|\w+|[^\w\s]"
)
_MAX_TOKENS = 4096
_MAX_PERIOD = 64
"""The longest loop that is looked for: a long sentence."""
_FEWEST_REPEATED = 9
"""No loop has fewer tokens that were there before."""
_SAME_FROM = 48
"""Texts of so many tokens may be loops with small differences."""
_SAME_SHARE = 0.4
"""Then at least this share of their runs of four tokens is different from all before."""


def is_repeating(text: str) -> bool:
    """Whether a text goes round in circles.

    Something comes again and again in a row, the oftener the shorter it is: one token ten times, a
    sentence three times; or a longer text says almost the same again and again.
    """
    tokens = _TOKENS.findall(text[: 32 * _MAX_TOKENS].lower())[:_MAX_TOKENS]
    if len(tokens) - len(set(tokens)) < _FEWEST_REPEATED:
        return False
    return _has_loop(tokens) or _says_the_same(tokens)


def _has_loop(tokens: list[str]) -> bool:
    for period in range(1, min(_MAX_PERIOD, len(tokens) // 3) + 1):
        times = _times(period)
        same = bytes(map(operator.eq, tokens, islice(tokens, period, None)))
        if b"\1" * (period * (times - 1)) in same:
            return True
    return False


def _times(period: int) -> int:
    """How often so many tokens come in a row before that is a loop."""
    if period == 1:
        return 10
    if period < 5:
        return 6
    return 4 if period < 10 else 3


def _says_the_same(tokens: list[str]) -> bool:
    if len(tokens) < _SAME_FROM:
        return False
    runs = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return len(set(runs)) < _SAME_SHARE * len(runs)
