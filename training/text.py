"""Transcripts: training targets in Whisper's own style, and the normalisation under which errors are counted."""

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from .errors import UserError

# Languages written without spaces between words, where the character error rate is the figure to read.
UNSPACED_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "my", "bo", "km"})
_MOST_OF_A_CORPUS = 0.9
_FIRST_PERSON = re.compile(r"\bi\b(?!-)")
_DOTTED_I_LANGUAGES = frozenset({"tr", "az"})
_DOTTED_I = str.maketrans({"I": "ı", "İ": "i"})


def language_code(language: str | None) -> str | None:
    """Whisper's code ("en") for a language given by code or English name; None stays None.

    Raises:
        UserError: Whisper does not know the language.
    """
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    if language is None:
        return None
    key = language.lower()
    if key in LANGUAGES:
        return key
    if key in TO_LANGUAGE_CODE:
        return TO_LANGUAGE_CODE[key]
    raise UserError(f"language {language!r} is not one Whisper knows; give a code such as en, zh or sw")


def source_and_language(given: str) -> tuple[str, str]:
    """Source and language, "" without one, of speech that is given as "SOURCE@LANGUAGE"."""
    path, at, language = given.rpartition("@")
    if not at or "/" in language or Path(given).exists():  # a path with @ in it
        return given, ""
    return path, language


def in_capitals(texts: Sequence[str]) -> list[bool]:
    """Which transcripts are sentences in capitals, of a corpus that is published in capitals without punctuation.

    It is if nine in ten of its transcripts with letters are: a few marks, commas or small letters change nothing.
    Not those in a script without capitals, whose only capitals are foreign names, nor those in small letters.
    """
    lettered = [text for text in texts if any(unicodedata.category(character)[0] == "L" for character in text)]
    if sum(map(_is_bare_capitals, lettered)) < _MOST_OF_A_CORPUS * max(1, len(lettered)):
        return [False] * len(texts)
    return [_is_mostly_capitals(text) for text in texts]


def _is_bare_capitals(text: str) -> bool:
    return _is_mostly_capitals(text) and text == text.upper() and not re.search(r"[.,?!;]", text)


def _is_mostly_capitals(text: str) -> bool:
    if any(unicodedata.category(character) == "Lo" and not character.islower() for character in text):
        return False
    cased = [character.isupper() for character in text if character.lower() != character.upper()]
    return 2 * sum(cased) >= len(cased)


def sentence_case(text: str, language: str | None = "en") -> str:
    """ "WE CALL IT BEAR" -> "We call it bear.": a capital first letter, a final full stop, and a capital English I.

    `language` is Whisper's code. Turkish and Azerbaijani have an i without a dot, whose capital is I.
    """
    text = text.strip()
    lowered = (text.translate(_DOTTED_I) if language in _DOTTED_I_LANGUAGES else text).lower()
    if language == "en":
        lowered = _FIRST_PERSON.sub("I", lowered)
    return text[:1].upper() + lowered[1:] + ("" if text.endswith((".", "?", "!")) else ".")


def as_written(text: str, language: str | None) -> str:
    """ "Go home." -> " Go home.": a transcript as Whisper writes it, with a space before the first word.

    Its tokens for a word at the start are those inside a sentence; without the space it would have to learn others.
    Languages written without spaces between words have none.
    """
    return text if language in UNSPACED_LANGUAGES else f" {text}"


def normalizer(language: str | None) -> Callable[[str], str]:
    """Whisper's normaliser for the language: English with its spelling map, simplified characters for Chinese, basic.

    For languages written without spaces, spaces are removed afterwards; the I of Turkish is lowered as it is there.
    Combining marks are kept, unlike in Whisper's own basic normaliser: they are the vowels of Hindi, Thai, Burmese and
    others.
    """
    if language == "en":
        return _english()
    if language in ("zh", "yue"):
        convert, basic = _to_simplified(), BasicTextNormalizer()
        return lambda text: basic(convert(text)).replace(" ", "")
    basic = BasicTextNormalizer(preserve_marks=True)
    if language in UNSPACED_LANGUAGES:
        return lambda text: basic(text).replace(" ", "")
    if language in _DOTTED_I_LANGUAGES:
        return lambda text: basic(unicodedata.normalize("NFC", text).translate(_DOTTED_I)).strip()
    return lambda text: basic(text).strip()


@functools.cache
def _english() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()


@functools.cache
def _to_simplified() -> Callable[[str], str]:
    from opencc import OpenCC

    return OpenCC("t2s").convert
