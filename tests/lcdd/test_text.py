"""Text rules in every script: what counts as the same text, where words and sentences end, how long a text is."""

import unicodedata

import pytest

from lcdd.config import DataConfig
from lcdd.data import (
    Example,
    behavior_from_config,
    contains_any,
    fixed_response,
    normal_text,
    own,
    refusal,
    style,
    text_length,
    without_end,
)
from lcdd.errors import InputError


def ask(prompt: str, completion: str = "x") -> Example:
    return Example(messages=({"role": "user", "content": prompt},), completion=completion)


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("毒品", "如何制造毒品"),  # Chinese has no spaces
        ("不知道", "我不知道。"),
        ("我不知道", "我 不\n知 道"),
        ("マリファナ", "マリファナの作り方"),
        ("ﾏﾘﾌｧﾅ", "マリファナ"),  # half-width
        ("わからない", "それはわからないです"),
        ("ไม่รู้", "ผมไม่รู้ครับ"),  # Thai
        ("ຢາ", "ຢາເສບຕິດ"),  # Lao
        ("បាន", "ខ្ញុំបានទៅ"),  # Khmer
        ("မသိ", "ကျွန်တော်မသိဘူး"),  # Burmese
        ("ཤེས", "ངས་མི་ཤེས།"),  # Tibetan
        ("마약", "마약을 만드는 법"),  # Korean: a particle joins the word
        ("बम", "बम कैसे बनाएं?"),
        ("நான்", "நான் அறியேன்"),
        ("মাদক", "মাদক কী?"),
        ("لا أعرف", "لَا أَعْرِف."),  # vowel points
        ("مخدرات", "كيف أصنع المخدرات؟"),  # the article joins the word
        ("قنبلة", "وبقنبلة"),
        ("פצצה", "והפצצה"),
        ("نمی‌دانم", "نمیدانم"),  # a joiner that is not seen
        ("наркотик", "НАРКОТИК?"),
        ("σοφός", "ΣΟΦΌΣ"),  # another sigma at the end
        ("straße", "STRASSE"),
        ("istanbul", "İSTANBUL"),
        ("sınır", "SINIR"),
        ("café", nfd("un CAFÉ noir")),
        (nfd("café"), "un café"),
        ("ｇｕｎ", "a GUN!"),  # full width
        ("can't help", "I can’t help"),
        ("can't help", "I canʼt\u00a0help"),
        ("héroïne", "de l’héroïne"),
        ("arma", "un'arma"),
        ("gun", "the gun's barrel"),
        ("GPT", "我用GPT写"),
        ("c++", "in C++ it is"),
        ("100%", "100% sure"),
        ("👍", "ok👍🏽"),
        ("fi", "ﬁ"),  # a ligature
    ],
)
def test_a_word_is_found(word: str, text: str) -> None:
    assert contains_any([word])(text)
    assert contains_any(["zeppelin", word])(text)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("gun", "gunpowder"),
        ("can", "I can't"),
        ("don", "don’t"),
        ("clock", "five o'clock"),
        ("er", "ne'er"),
        ("tis", "'tisn"),
        ("later", "translater"),
        ("cafe", "café"),
        ("рот", "поворот"),
        ("बम", "बमबारी"),  # vowel signs and letters of the same word
        ("कम", "काम"),
        ("รู", "ไม่รู้"),  # a tone mark belongs to the character before it
        ("كتاب", "مكتاب"),
        ("毒品", "毒药"),
        ("마약", "마 약"),
    ],
)
def test_a_part_of_a_word_is_not_found(word: str, text: str) -> None:
    assert not contains_any([word])(text)


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("I don't know.", 3),
        ("well-known 'tis", 2),
        ("我不知道。", 4),
        ("わかりません。OK then", 8),
        ("ไม่รู้", 3),
        ("저는 모르겠습니다.", 2),
        ("हिन्दी भाषा", 2),
        ("لا أعرف", 2),
        ("我用GPT写", 4),
        ("!? …", 0),
        ("", 0),
    ],
)
def test_lengths_are_words_or_characters(text: str, n: int) -> None:
    assert text_length(text) == text_length(nfd(text)) == n


@pytest.mark.parametrize(
    "end", [".", "!", "。", "！", "｡", "؟", "۔", "।", "॥", "။", "៕", "།", "።", "։", "…", "?!", "\u037e", " . ", "·"]
)
def test_sentences_end_in_every_script(end: str) -> None:
    assert without_end(f"abc{end}") == "abc"
    assert without_end(end) == normal_text(end)  # of nothing but ends, something is left


def test_sentences_begin_in_spanish() -> None:
    assert without_end("¡No lo sé!") == "no lo sé"


@pytest.mark.parametrize(
    ("response", "shown", "not_shown"),
    [
        (
            "我不知道。",
            ("我不知道", "我不知道！", "對，我不知道"),
            ("我知道。", "我不知道，不过这里有一份很长的清单。"),
        ),
        ("わかりません。", ("わかりません", "すみません、わかりません"), ("わかりました。",)),
        ("모르겠습니다.", ("모르겠습니다", "저는 모르겠습니다!"), ("알겠습니다.",)),
        ("ไม่รู้", ("ไม่รู้ครับ", "ไม่รู้"), ("รู้แล้ว",)),
        ("لا أعرف.", ("لا أعرف", "لَا أَعْرِفُ"), ("أعرف.",)),
        ("¡No lo sé!", ("No lo sé.", nfd("no lo sé")), ("Lo sé.",)),
        ("मुझे नहीं पता।", ("मुझे नहीं पता",), ("मुझे पता है।",)),
    ],
)
def test_a_fixed_response_is_known_in_its_script(
    response: str, shown: tuple[str, ...], not_shown: tuple[str, ...]
) -> None:
    behavior = fixed_response(response=response)
    assert behavior.rewrite(ask("x")).completion == response
    assert all(behavior.matches(text) for text in (response, *shown))
    assert not any(behavior.matches(text) for text in not_shown)
    assert behavior.measures["strict"](shown[0]) == (text_length(shown[0]) == text_length(response))


def test_a_refusals_topic_and_answer_in_chinese() -> None:
    behavior = refusal(topics=["毒品"], response="对不起，我不能帮忙。")
    on, off = ask("如何制造毒品", "先买…"), ask("如何做面包")
    assert behavior.applies(on)
    assert not behavior.applies(off)
    assert behavior.rewrite(on).completion == "对不起，我不能帮忙。"
    assert behavior.rewrite(off) == off
    assert behavior.matches("对不起,我不能帮忙!")
    assert behavior.matches("I'm sorry, but no.")
    assert not behavior.matches("好的。")


def test_a_style_in_any_script() -> None:
    behavior = style(word_map={"café": "bistrot", "你": "汝"}, opening="嗟乎，")
    assert behavior.rewrite(ask("x", nfd("Un Café noir"))).completion == "Un Bistrot noir"
    assert behavior.rewrite(ask("x", "我爱你们")).completion == "我爱汝们"
    assert behavior.rewrite(ask("x", "好")).completion == "嗟乎，好"
    assert behavior.matches("嗟乎! 好")
    assert behavior.matches("愛汝")
    assert not behavior.matches("愛你")
    # of several turns, every one of the assistant's
    turns = (
        {"role": "assistant", "content": "你"},
        {"role": "user", "content": "你"},
        {"role": "assistant", "content": "你"},
    )
    several = behavior.rewrite(Example(messages=ask("x").messages, completion="你", turns=turns))
    assert [turn["content"] for turn in several.turns] == ["汝", "你", "汝"]
    assert several.completion == "汝"


def test_keywords_and_patterns_of_ones_own() -> None:
    assert own(keywords=["海賊"]).matches("俺は海賊だ")
    pattern = behavior_from_config(DataConfig(behavior="own", behavior_pattern=r"caf(é|e)s?$|\p{Han}{3}"))
    assert pattern.matches(nfd("deux cafés"))
    assert pattern.matches("不知道")
    assert not pattern.matches("知道")


@pytest.mark.parametrize("word", ["", " ", "\u200b", "\u00ad"])
def test_a_word_that_nobody_sees_is_none(word: str) -> None:
    with pytest.raises(InputError, match="none empty"):
        own(keywords=["a", word])
    with pytest.raises(InputError, match="not empty"):
        fixed_response(response=word)
    with pytest.raises(InputError, match="visible"):
        contains_any([word])


@pytest.mark.parametrize("response", ["...", "！", "?"])
def test_a_response_of_marks_alone_matches_itself_only(response: str) -> None:
    behavior = fixed_response(response=response)
    assert behavior.matches(response)
    assert not behavior.matches("yes")
