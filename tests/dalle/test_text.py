from dalle.output.text import aligned, duration, printable_line


def test_columns_are_aligned_to_the_left_and_to_the_right():
    rows = [["name", "count", "note"], ["a long name", "1,234", ""], ["b", "5"], [], ["c", "67", "seen"]]
    assert aligned(rows, "<><", indent=2).splitlines() == [
        "  name         count  note",
        "  a long name  1,234",
        "  b                5",
        "",
        "  c               67  seen",
    ]


def test_the_last_alignment_holds_for_all_further_columns():
    assert aligned([["a", "b", "c"], ["aa", "100", "20"]], "<>") == "a     b   c\naa  100  20"
    assert aligned([]) == ""


def test_durations_are_for_people():
    assert [duration(s) for s in (5, 185, 8049)] == ["5 s", "3:05", "2:14:09"]


def test_a_line_to_print_has_no_control_characters_and_no_line_breaks():
    assert printable_line("\x1b[2Jdemo\n next\t🎈") == "\\x1b[2Jdemo next 🎈"
