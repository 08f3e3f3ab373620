"""Training targets and the normalisation of scores."""

import pytest

from fused_s2lora.training.errors import UserError
from fused_s2lora.training.text import (
    as_written,
    in_capitals,
    language_code,
    normalizer,
    sentence_case,
)


@pytest.mark.parametrize(
    ("published", "target"),
    [
        ("WE CALL IT BEAR", "We call it bear."),
        ("I THINK I'LL GO", "I think I'll go."),
        ("  MAY I SEE IT ", "May I see it."),
        ("TAXI IN PARIS", "Taxi in paris."),
    ],
)
def test_sentence_case(published, target):
    assert sentence_case(published) == target


def test_the_letter_i_of_other_languages():
    assert sentence_case("NOI SIAMO I PRIMI", "it") == "Noi siamo i primi."
    assert sentence_case("IŞIK İYİ Mİ", "tr") == "Işık iyi mi."
    assert sentence_case("İKİ", "az") == "İki."


def test_a_space_before_the_first_word_where_words_have_spaces():
    assert as_written("Go home.", "en") == as_written("Go home.", None) == " Go home."
    assert as_written("今天天气很好", "zh") == "今天天气很好"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["WE CALL IT BEAR", "GO HOME"], [True, True]),
        (["WE CALL IT BEAR", "Go home"], [False, False]),
        (["WE CALL IT BEAR.", "GO HOME"], [False, False]),
        (["今天天气很好"], [False]),
        (["IT'S 9"], [True]),
        (["我想要一个DVD", "今天天气很好"], [False, False]),
        (["DVD", "今天天气很好", "9"], [False, False, False]),
        (["यह NATO है"], [False]),
        (["هذا DVD"], [False]),
        (["1ª VEZ"], [True]),
        ([], []),
        # A few that are otherwise change nothing for the rest.
        ([*9 * ["GO HOME"], "Go home"], [*9 * [True], False]),
        ([*9 * ["GO HOME"], "<unk> THREE TWO"], 10 * [True]),
        ([*9 * ["GO HOME"], "YES, PLEASE."], 10 * [True]),
        ([*8 * ["GO HOME"], "Go home", "We call it bear"], 10 * [False]),
        ([*9 * ["Go home."], "OK"], 10 * [False]),
    ],
)
def test_capitals_are_recognised(texts, expected):
    assert in_capitals(texts) == expected


def test_what_is_not_quite_in_capitals_becomes_a_sentence():
    assert sentence_case("<unk> THREE TWO") == "<unk> three two."
    assert sentence_case("YES, PLEASE.") == "Yes, please."


def test_normalizers():
    assert normalizer("en")("Colour, it's ten dollars!") == "color it is $10"
    assert normalizer("zh")("訪價 上漲。") == "访价上涨"
    assert normalizer("ja")("今日 は") == "今日は"
    assert normalizer("de")("Größe, GRÖSSE!").split()[0] == "größe"
    assert normalizer(None)("Hallo, Welt!") == "hallo welt"
    assert normalizer("tr")("KIZIM GELİYOR") == normalizer("tr")("Kızım geliyor.") == "kızım geliyor"
    assert normalizer("az")("İstanbul") == normalizer("az")("istanbul")
    assert normalizer("tr")("I\u0307stanbul") == "istanbul"  # the dot a character of its own


def test_vowel_signs_are_part_of_a_word():
    hindi = normalizer("hi")
    assert hindi("वह लड़की है।").split() != hindi("वह लड़का है।").split()  # a girl is no boy
    assert len(hindi("हिन्दी").split()) == 1
    assert normalizer("th")("ไม่ได้") != normalizer("th")("ไมได")


def test_languages():
    assert language_code("English") == language_code("en") == "en"
    assert language_code("mandarin") == "zh"
    assert language_code(None) is None
    with pytest.raises(UserError, match="'klingon' is not one Whisper knows; give a code"):
        language_code("klingon")
