"""Pairwise cases: all pairs that can occur do, in no more cases than it takes."""

from __future__ import annotations

import itertools

from integration_tests.pairs import pairwise


def test_every_pair_that_is_allowed_occurs_and_no_other_case():
    parameters = [list("abcde"), [1, 2, 3], [True, False], [None, {"not": "hashable"}]]

    def allowed(letter, number, flag, _):
        return (letter != "a" or number == 1) and (number != 2 or flag)

    def pairs(combination):
        return itertools.combinations([(i, str(value)) for i, value in enumerate(combination)], 2)

    cases = pairwise(*parameters, allowed=allowed)
    assert all(allowed(*case) for case in cases)
    wanted = {pair for one in itertools.product(*parameters) if allowed(*one) for pair in pairs(one)}
    assert {pair for case in cases for pair in pairs(case)} == wanted
    # a letter but the first meets three numbers
    assert len(cases) == 1 + 4 * 3 + 1
    assert cases == pairwise(*parameters, allowed=allowed)


def test_two_parameters_have_all_combinations_and_one_has_all_values():
    assert pairwise("ab", [1, 2]) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert pairwise(range(5), [0, 1], [0, 1]) == pairwise(range(5), [0, 1], [0, 1])
    assert len(pairwise(range(5), [0, 1], [0, 1])) == 10
