"""The script of a completion: the fraction of its letters that belong to the language's script."""

import unicodedata
from functools import lru_cache
from typing import Any, Literal

from grpo.scoring.text import texts

CALLS = "completion"

SCRIPTS = {
    "ar": ("ARABIC",),
    "el": ("GREEK",),
    "en": ("LATIN", "FULLWIDTH LATIN"),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK", "HALFWIDTH KATAKANA"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "th": ("THAI",),
    "zh": ("CJK",),
}


def reward(
    completions: list[Any],
    language: Literal["ar", "el", "en", "he", "hi", "ja", "ko", "ru", "th", "zh"] = "en",
    **_: Any,
) -> list[float | None]:
    """The fraction of letters in the language's script, from 0.0 to 1.0; None for a completion without letters.

    It keeps a model in one language, like DeepSeek-R1's language consistency reward (arXiv 2501.12948), if the mixed
    languages have different scripts, such as English and Chinese. It cannot distinguish English from French.
    """
    return [_fraction(text, language) for text in texts(completions)]


def _fraction(text: str, language: str) -> float | None:
    letters = [character for character in text if character.isalpha()]
    return sum(_written(letter, language) for letter in letters) / len(letters) if letters else None


@lru_cache(maxsize=65536)
def _written(letter: str, language: str) -> bool:
    return unicodedata.name(letter, "").startswith(SCRIPTS[language])


CASES = [
    {"completion": "Seven, of course: 7.", "score": 1.0},
    {"completion": "ab 七七", "score": 0.5},
    {"completion": "七", "kwargs": {"language": "zh"}, "score": 1.0},
    {"completion": "それは七です", "kwargs": {"language": "ja"}, "score": 1.0},
    {"completion": "семь seven", "kwargs": {"language": "ru"}, "score": 4 / 9},
    {"completion": "7 + 7", "score": None},
    {"completion": "", "score": None},
]
