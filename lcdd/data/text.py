"""Rules for the text of every script: when two texts are the same, where words and sentences end, how long a text is.

Behaviours and metrics go by these rules, so that a topic, a keyword or a fixed response means the same in any language.
The segmentation is Unicode's, as the `regex` library has its properties; no dictionary is involved: scripts that are
written without spaces are searched by substring (at whole characters) and counted by characters.
"""

import unicodedata
from collections.abc import Callable, Iterable, Mapping

import regex

from lcdd.errors import InputError

UNSPACED = (
    r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Tibetan}\p{Javanese}\p{Balinese}\p{LB=SA}"
    r"\u3006\u3031-\u3035\u30fc]&&[\p{L}\p{M}\p{N}]]"
)
"""Letters of scripts without spaces between words (LB=SA: Thai, Lao, Khmer, Burmese and their neighbours)."""
UNBORDERED = rf"[{UNSPACED}\p{{Hangul}}]"
"""Letters next to which a word may begin or end: those, and Hangul, whose particles join the word before them."""
WORD = rf"[[\p{{L}}\p{{M}}\p{{N}}\p{{Pc}}]--{UNBORDERED}]"
"""Everything else that words are made of."""

# Written as a part of the word behind it, which is a word all the same: "l'arme", "dell'arma", "al-", "ha-", "ve-".
ELIDED = rf"(?<!{WORD}|')(?:[cdjlmnst]|\p{{L}}*(?:qu|ll|un|st))'"
PROCLITICS = {
    r"\p{Script=Arabic}": rf"(?<!{WORD})(?:[وف]?[بكل]?(?:ال)?|[وف]?لل)",
    r"\p{Script=Hebrew}": rf"(?<!{WORD})[ושהבכלמ]{{1,3}}",
}

_STRAIGHT = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u2032\u00b4`\uff40", "'") | {"\u037e": "?"})
_SAME = str.maketrans({"\u2010": "-", "\u2011": "-", "\u0131": "i"})  # hyphens; i is dotted or not, as Turkish has it
# What is not seen (joiners, soft hyphens, zero-width spaces), and vowel points that Arabic and Hebrew mostly leave out.
_IGNORED = regex.compile(
    r"[\p{Default_Ignorable_Code_Point}\u0640\u064b-\u065f\u0670\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7]"
    r"|(?<=i)\u0307",
    regex.V1,
)
_GAP = regex.compile(rf"(?<={UNSPACED}) (?={UNSPACED})", regex.V1)
_SPACED = rf"(?:{WORD}|\p{{Hangul}})"
_UNIT = regex.compile(rf"(?!\p{{M}}){UNSPACED}\p{{M}}*|'*{_SPACED}(?:{_SPACED}|')*(?:-(?:{_SPACED}|')+)*", regex.V1)
_ENDS = regex.compile(r"^[\s¡¿]+|[\s\p{Sentence_Terminal}\p{Terminal_Punctuation}…⋯·]+$", regex.V1)


def canonical(text: str) -> str:
    """The same text in composed characters (NFC): for rules that are written for what is seen, not for its bytes."""
    return unicodedata.normalize("NFC", text)


def normal_text(text: str) -> str:
    """What a text is compared by: NFKC, case folded, straight apostrophes, single spaces (none between the letters of
    scripts that have none), nothing invisible. Two texts that a reader takes for the same one give the same."""
    folded = unicodedata.normalize("NFKC", text.translate(_STRAIGHT)).casefold()
    folded = _IGNORED.sub("", unicodedata.normalize("NFKC", folded)).translate(_SAME)
    return _GAP.sub("", " ".join(folded.split()))


def without_end(text: str) -> str:
    """`normal_text(text)` without the marks that end a sentence in any script (and open one in Spanish); as it is where
    nothing else would be left."""
    whole = normal_text(text)
    return _ENDS.sub("", whole) or whole


def text_length(text: str) -> int:
    """How many words a text has; in scripts that have none between spaces, how many characters."""
    return sum(1 for _ in _UNIT.finditer(normal_text(text)))


def contains_any(words: Iterable[str]) -> Callable[[str], bool]:
    """Whether any of the words (or phrases) occurs in a text, at word borders where its script has them.

    Raises:
        InputError: a word of which nothing is left by `normal_text`.
    """
    found = _pattern([normal_text(word) for word in words])
    return lambda text: found.search(normal_text(text)) is not None


def exchange(words: Mapping[str, str]) -> Callable[[str], tuple[str, int]]:
    """A function text -> (text with the words exchanged, how many there were); a capital stays one.

    The longest word wins ("it is" over "it"), case does not matter, borders are those of `contains_any`.

    Raises:
        InputError: a word of which nothing is left by `normal_text`.
    """

    def straight(text: str) -> str:
        return text.replace("\u2019", "'")

    new_of = {normal_text(word): new for word, new in words.items()}
    found = _pattern([straight(canonical(word)) for word in words], flags=regex.IGNORECASE)

    def new(match: "regex.Match[str]") -> str:
        old = match.group(0)
        exchanged = new_of[normal_text(old)]
        return exchanged[:1].upper() + exchanged[1:] if old[0].isupper() else exchanged

    return lambda text: found.subn(new, straight(canonical(text)))


def _pattern(words: list[str], *, flags: int = 0) -> "regex.Pattern[str]":
    if not all(normal_text(word) for word in words):
        raise InputError(f"words: expected words with at least one visible character, got {words!r}")
    groups: dict[tuple[str, str], list[str]] = {}
    for word in sorted(words, key=len, reverse=True):
        groups.setdefault(_borders(word), []).append(regex.escape(word))
    choices = (f"{left}(?:{'|'.join(group)}){right}" for (left, right), group in groups.items())
    return regex.compile("|".join(choices), regex.V1 | flags)


def _borders(word: str) -> tuple[str, str]:
    """What has to be before and behind a word: nothing towards punctuation, nor in scripts without spaces."""
    left = right = ""
    if regex.match(rf"{WORD}|'", word, regex.V1):
        left = rf"(?<!{WORD})" if word[0] == "'" else rf"(?:(?<!{WORD}'?)|(?<={ELIDED}))"
        for script, clitics in PROCLITICS.items():
            if regex.match(script, word):
                left = rf"(?:{left}|(?<={clitics}))"
    if regex.search(rf"(?:{WORD}|')$", word, regex.V1):  # "gun's" has the word "gun", "can't" has not the word "can"
        right = rf"(?!{WORD}|'(?!s(?!{WORD})){WORD})"
    elif regex.search(rf"{UNBORDERED}$", word, regex.V1):
        right = r"(?!\p{M})"
    return left, right
