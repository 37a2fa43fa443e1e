"""One rule for every option that takes names of layers."""

from __future__ import annotations

import pytest

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.names import select

NAMES = ["stem", "block", "block.conv", "block.conv.0", "block1", "block10.conv", "a.b", "a.b.c", "head"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("stem", ["stem"]),
        ("block", ["block", "block.conv", "block.conv.0"]),
        ("block.conv", ["block.conv", "block.conv.0"]),
        (r"block\d+.*", ["block1", "block10.conv"]),
        (r"block\d", ["block1"]),
        (".*conv", ["block.conv", "block10.conv"]),
        ("stem|head", ["stem", "head"]),
    ],
)
def test_a_name_selects_itself_and_what_is_below_and_a_pattern_what_it_matches_in_full(pattern, found):
    assert select(pattern, NAMES, "exclude") == found


def test_names_may_come_from_any_iterable():
    assert select("head", iter(NAMES), "exclude") == ["head"]


@pytest.mark.parametrize("pattern", ["tail", "ste", "conv", "", "block.con"])
def test_what_selects_nothing_is_refused(pattern):
    with pytest.raises(InvalidOptionError, match=r"exclude: .*matches none of .*'stem'"):
        select(pattern, NAMES, "exclude")


@pytest.mark.parametrize("pattern", ["*conv", "block[", "(", "+"])
def test_what_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(InvalidOptionError, match=r"exclude: .*not a regular expression.*write '\.\*'") as caught:
        select(pattern, NAMES, "exclude")
    assert repr(pattern) in str(caught.value)


def test_the_dot_of_a_name_that_exists_is_a_dot():
    assert select("a.b", ["a.b", "axb"], "exclude") == ["a.b"]
