"""Suggestions for misspelt words."""

from selftrans.recipes import RECIPES
from selftrans.suggest import closest, did_you_mean, nearest


def test_nearest_word_or_all_of_them():
    assert nearest("digit", RECIPES) == "; did you mean digits?"
    assert nearest("zzz", ["a", "b"]) == "; choose one of a, b"
    assert nearest("zzz", iter(["a", "b"])) == "; choose one of a, b"


def test_closest_first_and_none_where_nothing_is_alike():
    assert closest("stesp", ["seeds", "steps"], most=1) == ["steps"]
    assert closest("zzz", ["a", "b"]) == []


def test_did_you_mean():
    assert did_you_mean([]) == ""
    assert did_you_mean(["a"]) == "; did you mean a?"
    assert did_you_mean(["a", "b", "c"]) == "; did you mean a, b or c?"
