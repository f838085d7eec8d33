"""The quality gate's judgement, by tables of captions in several languages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidValue
from shared.quality import (
    REASONS,
    QualityGate,
    badness,
    is_empty,
    is_refusal,
    is_repeating,
    resampling,
)
from shared.writing import LANGUAGES, is_written_as, language_code

CAPTIONS = {
    "en": "A woman in a red coat walks two small dogs across a snowy street, past a bakery.",
    "de": "Eine Frau in einem roten Mantel führt zwei kleine Hunde über eine verschneite Straße.",
    "fr": "Une femme en manteau rouge promène deux petits chiens dans une rue enneigée, près d'un café.",
    "es": "Una mujer con un abrigo rojo pasea a dos perros pequeños por una calle nevada.",
    "pt": "Uma mulher de casaco vermelho passeia com dois cães pequenos numa rua coberta de neve.",
    "it": "Una donna con un cappotto rosso porta a spasso due cagnolini in una strada innevata.",
    "vi": "Một người phụ nữ mặc áo khoác đỏ dắt hai chú chó nhỏ đi qua con phố đầy tuyết.",
    "ru": "Женщина в красном пальто выгуливает двух маленьких собак на заснеженной улице.",
    "uk": "Жінка в червоному пальті вигулює двох маленьких собак на засніженій вулиці.",
    "el": "Μια γυναίκα με κόκκινο παλτό περπατά με δύο μικρά σκυλιά στον χιονισμένο δρόμο.",
    "ar": "امرأة ترتدي معطفا أحمر تمشي مع كلبين صغيرين في شارع مغطى بالثلوج.",
    "he": "אישה במעיל אדום מטיילת עם שני כלבים קטנים ברחוב מושלג.",
    "hi": "लाल कोट पहने एक महिला बर्फीली सड़क पर दो छोटे कुत्तों को टहला रही है।",
    "th": "ผู้หญิงสวมเสื้อโค้ทสีแดงกำลังจูงสุนัขตัวเล็กสองตัวเดินบนถนนที่ปกคลุมด้วยหิมะ",
    "ko": "빨간 코트를 입은 여성이 눈 덮인 거리에서 작은 개 두 마리를 산책시키고 있다.",
    "ja": "赤いコートを着た女性が雪の積もった通りで二匹の小さな犬を散歩させている。",
    "zh": "一位身穿红色大衣的女士牵着两只小狗走过积雪的街道，旁边是一家面包店。",
}
"""One good caption in each language."""


@pytest.mark.parametrize("language", CAPTIONS)
def test_a_good_caption_passes_in_any_language(language: str) -> None:
    """With every check on."""
    assert QualityGate(language=language).judge(CAPTIONS[language], "stop") == []


@pytest.mark.parametrize("text", ["", " \n\t ", "...", "。", "-- !?", "\u200b", '""', "_"])
def test_what_says_nothing_is_empty(text: str) -> None:
    """Space and punctuation; no other reason is added."""
    assert is_empty(text)
    assert QualityGate(language="zh").judge(text, "length") == ["empty"]


@pytest.mark.parametrize("text", ["a", "7", "猫", "🐱", "€", "©", "한", "ä."])
def test_one_letter_digit_or_symbol_is_something(text: str) -> None:
    """In any script."""
    assert not is_empty(text)


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, I can’t assist with this request.",
    "Sorry, I cannot identify people in images.",
    "I am very sorry, but I am unable to describe this image.",
    "I apologize, but I cannot provide a caption for this image.",
    "Unfortunately, I am not able to see the image.",
    "I can't help with identifying this person.",
    "I cannot describe images of this kind.",
    "I'm unable to process images directly.",
    "As an AI language model, I do not have eyes.",
    "As a language model I cannot look at pictures.",
    "I don't have the ability to view images.",
    "I must decline to answer.",
    "**I'm sorry**, but I cannot fulfill this request.",
    "抱歉，我无法描述这张图片。",
    "对不起，我不能提供相关内容。",
    "很抱歉，我目前无法查看图片。",
    "非常抱歉，这张图片我没有办法识别。",
    "我无法识别图片中的人物。",
    "我不能协助处理这个请求。",
    "抱歉，我無法協助處理這個請求。",
    "作为一个人工智能助手，我没有观看图片的能力。",
    "作为AI语言模型，我只能处理文本。",
    "申し訳ありませんが、この画像について説明することはできません。",
    "申し訳ございません。お手伝いできません。",
    "죄송합니다. 이 이미지를 설명할 수 없습니다.",
    "죄송하지만 도와드릴 수 없어요.",
    "Lo siento, pero no puedo ayudar con eso.",
    "Desculpe, mas não posso descrever esta imagem.",
    "Mi dispiace, ma non posso aiutarti.",
    "Je suis désolé, mais je ne peux pas décrire cette image.",
    "Désolée, je ne suis pas en mesure de répondre.",
    "Es tut mir leid, aber ich kann dieses Bild nicht beschreiben.",
    "Leider kann ich dabei nicht helfen.",
    "Het spijt me, maar ik kan deze afbeelding niet beschrijven.",
    "Извините, но я не могу описать это изображение.",
    "К сожалению, я не могу помочь с этим запросом.",
    "عذراً، لا أستطيع وصف هذه الصورة.",
    "Xin lỗi, tôi không thể mô tả hình ảnh này.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_found(text: str) -> None:
    """Polite or short, with a straight or a curly apostrophe."""
    assert is_refusal(text)
    assert "refusing" in QualityGate().judge(text, "stop")


@pytest.mark.parametrize(
    "text",
    [
        "A card that reads 'I'm sorry, I can't come to your party'.",
        "A person holds a sign saying that they cannot help.",
        "The dog looks sorry for itself. It cannot reach the ball.",
        "I can't believe it's not butter, says the tub on the table.",
        "A sorry-looking tent that no longer can stand.",
        "Unfortunate weather: people cannot see the road.",
        "As an airplane lands, a crowd looks on.",
        "A screenshot of a chat in which an AI language model answers.",
        "图片上写着“抱歉，本店今天不营业”。",
        "一只无法飞行的企鹅站在冰面上。",
        "我和朋友在海边。",
        "作为装饰的灯笼挂在门口。",
        "「申し訳ありません」と書かれた看板。",
        "Ein Schild: Leider ausverkauft.",
        "Sorry! board game on a wooden table.",
    ],
)
def test_captions_that_only_sound_so_are_not_refusals(text: str) -> None:
    """What an image says is not what the model says."""
    assert not is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "red " * 10,
        "A cat. " * 6,
        "The image shows a cat on a mat. " * 4,
        "The image shows a large cat sitting on a mat in front of a window. " * 3,
        "A quiet street with trees. " + "and the trees and the cars " * 8,
        "一只猫" * 6,
        "图片中有一只猫坐在垫子上。" * 4,
        "哈" * 20,
        "画像には猫がいます。" * 4,
        "ha" + " ha" * 30,
        "!" * 40 + " wow",
        "1, 2, 1, 2, " * 8,
        "สวยมาก" * 8,
        " ".join(
            f"the {name} ball is on the floor of the room and the room is dark"
            for name in "abcdefghijkl"
        ),
    ],
)
def test_loops_are_found(text: str) -> None:
    """Of a word, a phrase, a sentence, characters; or almost the same each time."""
    assert is_repeating(text)
    assert "repeating" in QualityGate().judge(text, "stop")


@pytest.mark.parametrize(
    "text",
    [
        "very, very, very tall",
        "No, no, no! says the sign.",
        "A red square, a blue square, a green square and a yellow square on a white table.",
        "Two cats: one cat sleeps, one cat eats, one looks at the other cat.",
        "哈哈哈，孩子们笑得很开心。",
        "红色、蓝色、绿色和黄色的气球飘在空中。",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16",
        "The keypad reads 1 2 3, 4 5 6, 7 8 9, star 0 hash.",
        " ".join(CAPTIONS.values()),
        "A bus. A tram. A car. A bike. A boat. A plane. A train. A truck.",
    ],
)
def test_lists_and_emphasis_are_no_loops(text: str) -> None:
    """Things may be said more than once."""
    assert not is_repeating(text)


@pytest.mark.parametrize(
    ("text", "language", "is_right"),
    [
        (CAPTIONS["en"], "zh", False),
        (CAPTIONS["zh"], "en", False),
        (CAPTIONS["ja"], "zh", False),
        (CAPTIONS["zh"], "ja", False),
        (CAPTIONS["ko"], "ja", False),
        (CAPTIONS["ru"], "en", False),
        (CAPTIONS["en"], "ru", False),
        (CAPTIONS["hi"], "ar", False),
        (CAPTIONS["ru"], "uk", True),  # one script
        (CAPTIONS["de"], "en", True),  # likewise
        ("一台MacBook Pro放在桌子上，旁边是iPhone。", "zh", True),
        ("東京タワー", "ja", True),
        ("東京", "ja", True),
        ("A sign that reads 出口 (exit) in a station.", "en", True),
        ("招牌上写着“ラーメン”三个字。", "zh", True),
        ("赤い車がある。A red car is parked on the street in front of the house.", "ja", False),
        ("42", "zh", True),
        ("🐱🐱", "ko", True),
        ("Ceci est un café", "fr", True),
        ("Србија и Београд", "sr", True),
        ("Srbija i Beograd", "sr", True),
    ],
)
def test_a_language_is_told_by_its_script(text: str, language: str, *, is_right: bool) -> None:
    """Names in another script are allowed; languages of one script are not told apart."""
    assert is_written_as(text, language) is is_right
    found = QualityGate(language=language).judge(text, "stop")
    assert ("wrong_language" in found) is not is_right


@pytest.mark.parametrize(
    ("tag", "code"), [("en", "en"), ("zh-CN", "zh"), ("zh_Hant_TW", "zh"), ("PT-br", "pt")]
)
def test_a_language_tag_begins_with_its_code(tag: str, code: str) -> None:
    """In whatever case and form."""
    assert language_code(tag) == code


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"language": "xx"}, "quality.language", "name one of"),
        ({"checks": []}, "quality.checks", "name some of"),
        ({"checks": ["wrong_language"]}, "quality.language", "needs 'language'"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(
    fields: dict[str, Any], param: str, says: str
) -> None:
    """With the field and what to do."""
    with pytest.raises(InvalidValue, match=says) as caught:
        QualityGate(**fields).check()
    assert caught.value.param == param


def test_the_worst_reason_comes_first() -> None:
    """A refusal in the wrong language that was cut off has three."""
    found = QualityGate(language="zh").judge(REFUSALS[0], "length")
    assert found == ["refusing", "wrong_language", "truncated"]
    assert [reason for reason in REASONS if reason in found] == found


def test_only_the_checks_that_were_asked_for_are_made() -> None:
    """Others do not count."""
    gate = QualityGate(checks=["truncated"])
    assert gate.judge(REFUSALS[0], "stop") == []
    assert gate.judge("", "stop") == []
    assert gate.judge(REFUSALS[0], "length") == ["truncated"]


def test_one_worse_reason_outweighs_all_milder_ones() -> None:
    """And nothing is best."""
    assert badness([]) < badness(["truncated"]) < badness(["wrong_language"])
    milder = badness(["refusing", "repeating", "wrong_language", "truncated"])
    assert milder < badness(["empty"])


def ask_again(attempt: int = 1, key: str = "batch|1", **fields: Any) -> Any:
    """How to ask again, after an empty caption unless told otherwise."""
    asked: dict[str, Any] = {
        "seed": 7, "temperature": 0.0, "top_k": 40, "repetition_penalty": 1.0, **fields
    }  # fmt: skip
    reasons = asked.pop("reasons", ["empty"])
    gate = asked.pop("gate", QualityGate())
    return resampling(gate, reasons, attempt=attempt, key=key, **asked)


def test_each_time_is_asked_with_another_seed_and_more_heat() -> None:
    """The same item in the same way whenever it is done again."""
    first, second = ask_again(1), ask_again(2)
    assert first == ask_again(1)
    assert len({first.seed, second.seed, ask_again(key="batch|2").seed}) == 3
    assert 0 < first.temperature < second.temperature
    assert ask_again(temperature=1.0).temperature == 1.0


def test_the_temperature_may_be_given_and_has_a_limit() -> None:
    """That of the first time."""
    gate = QualityGate(temperature=1.9)
    assert ask_again(1, gate=gate).temperature == 1.9
    assert ask_again(8, gate=gate).temperature == 2.0


def test_loops_are_asked_again_with_a_penalty_on_repeating() -> None:
    """Other faults are not."""
    assert ask_again(2, reasons=["repeating"]).repetition_penalty > 1.0
    assert ask_again(2, reasons=["refusing"]).repetition_penalty == 1.0


def test_greedy_choosing_is_given_up() -> None:
    """Of one candidate, no temperature makes another answer."""
    assert ask_again(top_k=1).top_k > 1
    assert ask_again(top_k=0).top_k == 0


@given(st.text(), st.sampled_from(LANGUAGES), st.sampled_from(["stop", "length"]))
def test_any_text_is_judged(text: str, language: str, finish_reason: str) -> None:
    """Reasons in their order, each once."""
    found = QualityGate(language=language).judge(text, finish_reason)
    assert found == [reason for reason in REASONS if reason in found]
    assert ("empty" in found) == is_empty(text)
