from storage.errors import reason_of


def test_an_error_is_told_in_one_line():
    assert reason_of(ValueError("wrong\n  shape")) == "wrong shape"
    assert reason_of(ValueError("wrong shape"), limit=5) == "wrong"


def test_an_error_without_a_message_is_told_by_its_type():
    assert reason_of(KeyboardInterrupt()) == "KeyboardInterrupt"
