"""Suggestions for misspelt words."""

from selftrans.recipes import RECIPES
from selftrans.suggest import closest, did_you_mean, nearest


def test_nearest_word_or_else_all_words():
    assert nearest("digit", RECIPES) == "; did you mean digits or digits_t2i?"
    assert nearest("zzz", ["a", "b"]) == "; choose one of a, b"
    assert nearest("zzz", iter(["a", "b"])) == "; choose one of a, b"


def test_closest_word_comes_first_and_unlike_words_give_none():
    assert closest("stesp", ["seeds", "steps"], most=1) == ["steps"]
    assert closest("zzz", ["a", "b"]) == []


def test_did_you_mean():
    assert did_you_mean([]) == ""
    assert did_you_mean(["a"]) == "; did you mean a?"
    assert did_you_mean(["a", "b", "c"]) == "; did you mean a, b or c?"
