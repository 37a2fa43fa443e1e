"""Rendering, decoding and scoring lines of text, all without the recognizer's weights."""

import pytest
import torch
from torch import fx

from integration_tests.benchmarks import recognizer
from integration_tests.benchmarks.recognizer import decode, edit_distance, lines

CHARACTERS = ("", "a", "b", " ")


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        ([0, 0, 0], ""),
        ([1, 1, 2, 2], "ab"),
        ([1, 0, 1, 1], "aa"),
        ([0, 2, 3, 3, 0, 3, 1], "b  a"),
    ],
)
def test_equal_neighbours_are_merged_before_blanks_are_dropped(classes: list[int], text: str) -> None:
    assert decode(torch.tensor([classes, [0] * len(classes)]), CHARACTERS) == [text, ""]


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("", "abc", 3), ("same", "same", 0), ("kitten", "sitting", 3), ("ab", "ba", 2), ("flaw", "lawn", 2)],
)
def test_the_edit_distance_counts_what_must_change(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_lines_are_the_same_every_time_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    (first, texts), (second, same_texts) = (lines(8, "train", seed=3) for _ in range(2))
    assert first.shape == (8, 3, recognizer.HEIGHT, recognizer.WIDTH)
    assert torch.equal(first, second)
    assert texts == same_texts
    assert texts != lines(8, "train", seed=4)[1]
    assert float(first.abs().max()) <= 1
    assert torch.equal(state, torch.get_rng_state())


def test_no_word_is_in_both_splits() -> None:
    drawn = {split: {word for text in lines(64, split)[1] for word in text.split()} for split in ("train", "test")}
    assert drawn["train"]
    assert drawn["train"].isdisjoint(drawn["test"])


def test_logits_are_those_of_the_last_softmax() -> None:
    network = recognizer.Recognizer(classes=len(CHARACTERS)).eval()
    images, _ = lines(2, "train")
    found = recognizer.logits(fx.symbolic_trace(network), images)
    assert found.shape == (2, recognizer.WIDTH // 8, len(CHARACTERS))
    torch.testing.assert_close(found.softmax(2), network(images))
