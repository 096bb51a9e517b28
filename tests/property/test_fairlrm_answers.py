"""The parser of written rankings: total, exact in its counts, inventing nothing (fairlrm 5.4, 9.5)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.prompts.fairlrm_answers import ParsedRanking, RankingParser, normalised

TITLES = (
    "English Patient, The",
    "Fargo",
    "Star Wars",
    "Star Wars: Return of the Jedi",
    "Amélie",
    "2001: A Space Odyssey",
)
LABELS = ("A", "B", "C", "D", "E", "F")
PARSER = RankingParser(LABELS, TITLES)


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ('["B", "A", "F"]', (1, 0, 5)),
        ('Sure:\n```json\n["B", "A"]\n```', (1, 0)),
        ('["B", "A", "F', (1, 0, 5)),
        ("B, A, C", (1, 0, 2)),
        ("B > A > C", (1, 0, 2)),
        ("1. Fargo\n2. The English Patient\n3. Star Wars", (1, 0, 2)),
        ("- **Fargo** (1996)\n- *amelie*", (1, 4)),
        ("B. Fargo\nA) English Patient, The", (1, 0)),
        ("2001: A Space Odyssey\n1. Star Wars: Return of the Jedi", (5, 3)),
        ("Fargo (Crime, Drama) [popular]", (1,)),
        ("Farggo\nEnglsh Patient", (1, 0)),
        ('<think>maybe "A"</think>["C"]', (2,)),
        (b'["A", "\xff"]', (0,)),
    ],
)
def test_entries_are_read_in_the_forms_models_write_them(text, order):
    assert PARSER.parse(text).order == order


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ParsedRanking((), 0, 0, 0, 6)),
        ("I like films.", ParsedRanking((), 1, 1, 0, 6)),
        ('["A", "A", "B", "Casablanca", "A"]', ParsedRanking((0, 1), 5, 1, 2, 4)),
        ("1. Fargo\n2. Casablanca\n3. Fargo", ParsedRanking((1,), 3, 1, 1, 5)),
        ('["A", 3, null, ["B"]]', ParsedRanking((0,), 4, 3, 0, 5)),
        ('["Star Wars 7"]', ParsedRanking((), 1, 1, 0, 6)),
        ("[" * 3000, ParsedRanking((), 0, 0, 0, 6)),
    ],
)
def test_counts_are_exact(text, expected):
    assert PARSER.parse(text) == expected


def test_a_title_that_fits_two_candidates_names_neither():
    parser = RankingParser((), ("Heat", "The Heat", "Alien"))
    assert parser.parse("Heat").order == (0,)  # exactly one title
    assert parser.parse("heat").order == ()
    assert RankingParser((), ("Alien 2", "Alien 3")).parse("Alien 4").order == ()


def test_normalising_forgets_case_articles_accents_and_punctuation():
    assert normalised("The  Matrix!") == normalised("matrix, The") == "matrix"
    assert normalised("Amélie") == "amelie"


pieces = st.sampled_from([*TITLES, *LABELS, "Casablanca", '"', "[", "]", ",", "\n", "1. ", "- ", "{", "\ud800", "\x00"])


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=300), st.binary(max_size=200), st.lists(pieces, max_size=30).map("".join)))
def test_any_answer_gives_a_ranking_of_candidates_and_consistent_counts(text):
    found = PARSER.parse(text)
    assert len(set(found.order)) == len(found.order)
    assert set(found.order) <= set(range(6))
    assert found.missing == 6 - len(found.order)
    assert found.entries == len(found.order) + found.invalid + found.duplicates
    assert PARSER.parse(text) == found
