"""Tests marked `interpreted` run in Triton's interpreter, and fail where they fail there."""

import pytest

triton = pytest.importorskip("triton")


@pytest.mark.interpreted
def test_a_marked_case_is_interpreted():
    assert triton.knobs.runtime.interpret


def test_another_is_not():
    assert not triton.knobs.runtime.interpret


@pytest.mark.interpreted
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.xfail(strict=True, raises=pytest.fail.Exception)
def test_what_fails_there_fails(number):
    assert not triton.knobs.runtime.interpret
