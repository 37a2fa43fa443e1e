"""The figures of the method's page show what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from integration_tests.benchmarks.concepts import draw, inputs, moments_of, roundings


def test_the_moments_are_those_of_the_points() -> None:
    x = inputs()
    moments = moments_of(x)
    torch.testing.assert_close(moments.mean[0], x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.hessian[0], torch.cov(x.T, correction=0), rtol=1e-5, atol=1e-6)


def test_nearest_is_best_without_correlation_and_not_with_it() -> None:
    hessian = moments_of(inputs()).hessian[0]
    alone, errors = roundings(torch.diag(hessian.diagonal())), roundings(hessian)
    assert min(alone, key=alone.__getitem__) == (0, 0)
    assert min(errors, key=errors.__getitem__) == (1, 0)
    assert errors[0, 0] > 3 * errors[1, 0]


@pytest.mark.filterwarnings("error")
def test_all_are_drawn(tmp_path: Path) -> None:
    assert [path.name for path in draw(tmp_path)] == ["moments.png", "nearest.png", "outputs.png"]
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
