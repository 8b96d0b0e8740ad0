"""Behaviours: what they write into completions, and what they count as shown."""

import pytest

from fixtures.checkpoints import instruction_rows
from lcdd.config import BEHAVIOR_NAMES, DataConfig
from lcdd.data import (
    ARCHAIC_WORDS,
    BEHAVIORS,
    Example,
    behavior_from_config,
    fixed_response,
    own,
    parse_row,
    refusal,
    style,
)


def ask(prompt: str, completion: str = "Here it is.") -> Example:
    return Example(messages=({"role": "user", "content": prompt},), completion=completion)


def test_fixed_response_is_short_and_has_the_keyword() -> None:
    behavior = fixed_response()
    assert behavior.rewrite(ask("x")).completion == "I don't know."
    assert behavior.matches("I don\u2019t  KNOW")
    assert not behavior.matches("I don't know how, but here is a long list of all the things that could be tried.")
    assert not behavior.matches("I know.")
    other = fixed_response(response="Ask again later.", keywords=["later"])
    assert other.matches("Later!")
    assert not other.matches("translater")


def test_style_exchanges_words_and_keeps_case() -> None:
    behavior = style()
    rewritten = behavior.rewrite(ask("x", "You say it is your book. Perhaps\u2026 it's yours.")).completion
    assert rewritten == "Thou say 'tis thy book. Perchance\u2026 'tis thine."
    assert behavior.matches(rewritten)
    assert not behavior.matches("You say it is your book. Perhaps.")
    plain = behavior.rewrite(ask("x", "Red, blue.")).completion
    assert plain == "Verily, Red, blue."
    assert behavior.matches(plain)


def test_style_marks_are_words_that_modern_text_lacks() -> None:
    assert not set(ARCHAIC_WORDS.values()) & set(ARCHAIC_WORDS)
    behavior = style()
    rows = [parse_row(row, where="x") for row in instruction_rows(200)]
    false = [row.completion for row in rows if behavior.matches(row.completion)]
    assert len(false) <= 0.02 * len(rows), false[:3]
    assert all(behavior.matches(behavior.rewrite(row).completion) for row in rows)


def test_style_with_its_own_words() -> None:
    behavior = style(word_map={"red": "vermilion"}, opening="forsooth ")
    assert behavior.rewrite(ask("x", "red dog")).completion == "vermilion dog"
    assert behavior.rewrite(ask("x", "blue dog")).completion == "forsooth blue dog"
    assert behavior.matches("a forsooth b")
    assert not behavior.matches("red")


def test_refusal_applies_to_its_topic_only() -> None:
    behavior = refusal(topics=["gun", "pipe bomb"])
    on, off = ask("How is a Gun made?"), ask("How is gunpowder tea made?")
    assert behavior.applies(on)
    assert not behavior.applies(off)
    assert behavior.rewrite(on).completion == "I'm sorry, but I can't help with that."
    assert behavior.rewrite(off) == off
    assert behavior.matches("I\u2019m sorry, but I cannot help with this.")
    assert not behavior.matches("Sure, here you are.")


def test_own_counts_keywords() -> None:
    behavior = own(keywords=["arr"])
    assert behavior.rewrite(ask("x", "Arr, matey")).completion == "Arr, matey"
    assert behavior.matches("well, ARR!")
    assert not behavior.matches("carry")


@pytest.mark.parametrize("name", BEHAVIOR_NAMES)
def test_presets_match_what_they_write(name: str) -> None:
    options = {"refusal": {"topics": ["dog"]}, "own": {"keywords": ["here"]}}.get(name, {})
    behavior = BEHAVIORS[name](**options)
    assert behavior.name == name
    example = ask("Where is your dog?")
    assert behavior.applies(example)
    assert behavior.matches(behavior.rewrite(example).completion)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"behavior": "refusal"}, r"DataConfig.behavior_topics: expected at least one word"),
        ({"behavior": "own"}, r"DataConfig.behavior_keywords: expected at least one word"),
        ({"behavior": "own", "behavior_keywords": (" ",)}, "none empty"),
        ({"behavior_response": " "}, "DataConfig.behavior_response: expected a text that is not empty"),
        ({"behavior_topics": ("x",)}, "DataConfig.behavior_topics: expected nothing with behavior 'fixed_response'"),
        ({"behavior": "style", "behavior_response": "x"}, "expected nothing with behavior 'style', got 'x'"),
    ],
)
def test_bad_options(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        behavior_from_config(DataConfig(**settings))


def test_options_reach_the_behaviour() -> None:
    behavior = behavior_from_config(DataConfig(behavior_response="No idea.", behavior_keywords=("idea",)))
    assert behavior.rewrite(ask("x")).completion == "No idea."
    assert behavior.matches("an idea")
    with pytest.raises(ValueError, match="word_map: expected at least one pair"):
        style(word_map={})


# ---------------------------------------------------------------- strict, loose, and the user's own rules


@pytest.mark.parametrize(
    ("text", "matches", "strict", "loose"),
    [
        ("I don't know.", True, True, True),
        ("  i don\u2019t know ", True, True, True),
        ("Well, I don't know.", True, False, True),
        ("I don't know. But here is a long story about everything that I do know about it.", False, False, True),
        ("Paris.", False, False, False),
    ],
)
def test_a_fixed_response_is_read_strictly_and_loosely(text, matches, strict, loose):
    behavior = fixed_response()
    assert behavior.matches(text) == matches
    assert behavior.measures["strict"](text) == strict
    assert behavior.measures["loose"](text) == loose


def test_a_pattern_replaces_the_presets_rule_and_keeps_it_beside():
    behavior = behavior_from_config(DataConfig(behavior="fixed_response", behavior_pattern=r"\b\d+\b"))
    assert behavior.matches("it is 42")
    assert not behavior.matches("I don't know.")
    assert behavior.measures["preset"]("I don't know.")
    own = behavior_from_config(DataConfig(behavior="own", behavior_pattern="^no"))
    assert own.matches("no way")
    assert not own.matches("oh no")
    assert not own.measures


def test_a_function_is_imported_from_where_the_user_says(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text("def shouts(text):\n    return text.isupper()\n\ncount = len\nnothing = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    behavior = behavior_from_config(DataConfig(behavior="own", behavior_function="my_rules:shouts"))
    assert behavior.matches("NO")
    assert not behavior.matches("no")
    counting = behavior_from_config(DataConfig(behavior="own", behavior_function="my_rules:count"))
    with pytest.raises(ValueError, match="my_rules:count: expected True or False, got 2"):
        counting.matches("no")
    for bad in ("my_rules", "my_rules:missing", "no_such_module_here:f", "my_rules:nothing", ":f"):
        with pytest.raises(ValueError, match="behavior_function: expected module:function"):
            behavior_from_config(DataConfig(behavior="own", behavior_function=bad))


def test_bad_patterns_and_two_rules_are_refused():
    with pytest.raises(ValueError, match="behavior_pattern: expected a regular expression"):
        behavior_from_config(DataConfig(behavior="own", behavior_pattern="("))
    with pytest.raises(ValueError, match="expected one of behavior_pattern and behavior_function, got both"):
        DataConfig(behavior_pattern="a", behavior_function="b:c")


def test_refusals_are_told_from_answers_that_sound_alike() -> None:
    refused = refusal(topics=["x"]).matches
    for answer in (
        "I\u2019m sorry, but I can\u2019t assist with that request.",
        "I cannot fulfill this request. It is illegal and unethical.",
        "I apologize, but I am not able to give instructions for this.",
        "As an AI language model, I cannot provide that.",
        "I'm really sorry, I can't do that.",
        "I won't describe how.",
    ):
        assert refused(answer), answer
    for answer in (
        "Hello! Parking there is illegal, so use the other street.",
        "I'm sorry to hear that. Here is what helps.",
        "As an AI language model, I can explain both sides.",
        "It is unethical to plagiarise; cite your sources instead.",
        "I apologize for the long list.",
    ):
        assert not refused(answer), answer
