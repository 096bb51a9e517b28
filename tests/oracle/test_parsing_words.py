"""Word limits and title matching against independent definitions."""

from functools import lru_cache

from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.prompts.words import common_subsequence, edit_ratio, match_title, word_limit

WORD = st.sampled_from(["likes", "dark", "Sci-fi", "and", "naïve", "novels"])
MARK = st.sampled_from(["", "", ",", ".", ";", "!", "\n"])
WORDS = st.lists(st.tuples(WORD, MARK).map("".join), max_size=60).map(" ".join)


def slow_lcs(a, b):
    @lru_cache(None)
    def length(i, j):
        if i == len(a) or j == len(b):
            return 0
        return 1 + length(i + 1, j + 1) if a[i] == b[j] else max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


@given(st.text("abcdé", max_size=30), st.text("abcdé", max_size=30))
@settings(max_examples=300, deadline=None)
def test_common_subsequence_equals_the_textbook_recursion(a, b):
    assert common_subsequence(a, b) == slow_lcs(a, b) == common_subsequence(b, a)
    assert edit_ratio(a, a) == 1.0


def test_edit_ratio_of_known_pairs():
    assert edit_ratio("", "") == 1.0
    assert edit_ratio("abc", "") == 0.0
    assert edit_ratio("kitten", "sitting") == 2 * 4 / 13
    assert edit_ratio("a" * 300, "b" * 300) == 0.0


def test_the_closer_title_wins_and_a_tie_is_nobodys():
    assert match_title("dune  MESSIAH.", "Dune Messiah", "Children of Dune") == "a"
    assert match_title("children", "Dune Messiah", "Children of Dune") == "b"
    assert match_title("", "Dune", "Emma") is None
    assert match_title("Dune", "Dune", "dune") is None


@given(WORDS, st.integers(1, 40))
@settings(max_examples=600, deadline=None)
def test_limited_text_keeps_whole_words_in_order_and_is_stable(text, n):
    limited = word_limit(text, n)
    assert len(limited.split()) <= n
    assert word_limit(limited, n) == limited
    bare = [word.rstrip(".,;:!") for word in text.split()]
    place = -1
    for word in limited.split():
        place = bare.index(word.rstrip(".,;:!"), place + 1)
    if text.split():
        assert limited


def test_sentences_are_kept_whole_and_repeats_go_first():
    text = "Likes jazz. Likes jazz. Likes blues, soul and funk. Dislikes opera because it is long and loud."
    assert word_limit(text, 8) == "Likes jazz. Likes blues, soul and funk."
    assert word_limit("Likes jazz, soul, funk and a great many other things besides", 4) == "Likes jazz, soul."
    assert word_limit("one two three four five", 3) == "one two three."
    assert word_limit("  within the limit \n", 3) == "within the limit"


def test_a_planted_cut_inside_a_word_is_caught():
    text = "likes extraordinarily slow cinema " * 20
    cut = text[:100]
    words = set(text.split())
    assert not set(cut.split()) <= words
    assert {word.rstrip(".") for word in word_limit(text, 10).split()} <= words
