"""A subject in its prompt: exactly, or alike in one place; and what tells texts that look the same."""

import unicodedata

import pytest

from kedit_fast.facts.subjects import Names, as_template, folded, is_named, places_alike

NFC, NFD = (unicodedata.normalize(form, "Čapek") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    "text, subject, template, spelled",
    [
        ("Paris is in", "Paris", "{} is in", "Paris"),
        ("Annex Ann was built", "Ann", "Annex {} was built", "Ann"),
        ("{} is in", "Paris", "{} is in", "Paris"),
        ("the moon is in", "The Moon", "{} is in", "the moon"),
        ("Grey’s Anatomy is on", "Grey's Anatomy", "{} is on", "Grey’s Anatomy"),
        ("So “Lost” is on", '"lost"', "So {} is on", "“Lost”"),
        (f"Karel {NFD} was", NFC, "Karel {} was", NFD),
        (f"Karel {NFC} was", NFD, "Karel {} was", NFC),
        ("New\u00a0York  City is", "new york city", "{} is", "New\u00a0York  City"),
        ("The Straße is", "STRASSE", "The {} is", "Straße"),
        ("Co\u00adop is a", "Coop", "{} is a", "Co\u00adop"),
        ("Anna met ann and", "ANN", "Anna met {} and", "ann"),
        ("Iowa and", "IOWA", "{} and", "Iowa"),
    ],
)
def test_the_place_of_a_subject(text, subject, template, spelled):
    assert as_template(text, subject) == (template, spelled)
    assert template.replace("{}", spelled) == text or "{}" in text
    assert "{}" in text or is_named(text, subject)


@pytest.mark.parametrize(
    "text, subject, says",
    [
        ("Rome is in", "Paris", "subject 'Paris' not in prompt 'Rome is in'; the prompt needs the subject or one {}"),
        ("a is", " ", "the subject is empty (' ')"),
        ("PARIS or paris is", "Paris", "alike in 2 places ('PARIS', 'paris'); put {} in the one that is meant"),
        ("Caf\u00e9 CAF\u00c9", "cafe\u0301", "'cafe\u0301' (U+0301) is not in prompt"),
        ("Caf\u00e9 CAF\u00c9", "cafe\u0301", "('Caf\u00e9' (U+00E9), 'CAF\u00c9' (U+00C9))"),
        ("P\u0430ris is in", "Paris", "looks like it: U+0430 CYRILLIC SMALL LETTER A there, "
                                   "U+0061 LATIN SMALL LETTER A in the subject"),
        ("Cafe\u0301 is in", "Cafe", "subject 'Cafe' not"),  # the e with its accent is another letter
        ("Straße is", "se", "not in prompt"),
        ("Straße is", "tras", "not in prompt"),  # not half of an ß
    ],
)  # fmt: skip
def test_a_subject_without_one_place(text, subject, says):
    with pytest.raises(ValueError) as error:
        as_template(text, subject)
    assert says in str(error.value)
    assert (text in str(error.value) and "U+" not in says) or "U+" in str(error.value)


def test_words_that_differ_show_no_code_points():
    with pytest.raises(ValueError) as error:
        as_template("Лондон is in", "Москва")
    assert "U+" not in str(error.value)


def test_folded():
    assert folded("  The\tMOON ’s \n") == "the moon 's"
    assert folded(NFC) == folded(NFD) == "c\u030capek"
    assert folded("a\u0323\u0302") == folded("a\u0302\u0323")  # marks in either order
    assert places_alike("xa\u0302\u0323y", "a\u0323\u0302") == [(1, 4)]


def test_names_are_found_whatever_the_case():
    names = Names(["Big Ben", "Io", "東京タワー", "Zürich"])
    assert all(map(names.in_text, ("They say BIG BEN is tall", "the moon io", "東京タワーは", "in ZÜRICH")))
    assert not any(map(names.in_text, ("Big  Ben and Zurich", ""))) and not Names([]).in_text("anything")


def test_names_are_found_between_ends_of_words():
    """Whatever the case; in scripts without spaces anywhere."""
    names = Names(["Io", "The Eiffel Tower", "パリ", "C++", "Paris"])
    for text, found in (
        ("Iowa and Io are", {"io"}), ("iowa", set()), ("THE EIFFEL TOWER's city", {"the eiffel tower"}),
        ("首都パリは", {"パリ"}), ("C++'s father, Parisian", {"c++"}), ("", set()),
    ):  # fmt: skip
        assert names.named(text) == found
    assert not names.in_text("iowa") and Names([]).named("Io") == set()
    assert Names(["", " ", "x"]).in_text("an x") and not Names(["", " ", "x"]).in_text("ax")


def test_a_name_inside_a_longer_one_is_not_named():
    names = Names(["York", "New York", "New York City", "City"])
    for text, found in (
        ("New York is in", {"new york"}), ("York is in", {"york"}), ("New York and York", {"new york", "york"}),
        ("New York City", {"new york city"}), ("the New York Times", {"new york"}), ("City of York", {"city", "york"}),
    ):  # fmt: skip
        assert names.named(text) == found
