import numpy as np
import pytest
import torch

from storage.errors import check_number, check_whole, reason_of


def test_an_error_is_told_in_one_line():
    assert reason_of(ValueError("wrong\n  shape")) == "wrong shape"
    assert reason_of(ValueError("wrong shape"), limit=5) == "wrong"


def test_an_error_without_a_message_is_told_by_its_type():
    assert reason_of(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize("value", [3, -1, 10**30, np.int64(3)])
def test_whole_numbers_are_pythons_and_numpys(value):
    check_whole("n", value)
    check_number("n", value)


@pytest.mark.parametrize("value", [None, "2", 2.0, True, b"2", [2], torch.tensor(2)])
def test_what_is_no_whole_number_is_named_with_its_type(value):
    with pytest.raises(ValueError, match=rf"^n is .*, of type {type(value).__name__}; expected a whole number$"):
        check_whole("n", value)


@pytest.mark.parametrize("value", [None, "0.5", True, 1j, [0.5]])
def test_what_is_no_number_is_named_with_its_type(value):
    with pytest.raises(ValueError, match=rf"of type {type(value).__name__}; expected a number$"):
        check_number("temperature", value)


def test_numbers_are_those_that_a_float_can_hold():
    for value in (0, 0.5, np.float32(0.5), -0.0, float("inf")):
        check_number("temperature", value)
    with pytest.raises(ValueError, match="temperature is a number of more than 308 digits"):
        check_number("temperature", 10**400)


def test_a_wrong_value_is_shown_in_short():
    with pytest.raises(ValueError, match="of type list") as caught:
        check_whole("n", ["x" * 10_000] * 100)
    assert len(str(caught.value)) < 400
