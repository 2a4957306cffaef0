from utils.common.tables import format_table


def test_numbers_stand_right_and_text_left():
    table = format_table(
        ["layer", "shape", "kept", "accuracy %"],
        [["features.0.0", "32x3x3x3", 864, 90.125], ["classifier.1", "10x1280", 12800, 9.0]],
    )
    assert table == (
        "layer         shape      kept  accuracy %\n"
        "------------  --------  -----  ----------\n"
        "features.0.0  32x3x3x3    864       90.12\n"
        "classifier.1  10x1280   12800        9.00"
    )


def test_formatted_numbers_and_dashes_count_as_numbers():
    table = format_table(
        ["a", "b", "c", "d"],
        [["+0.35", "3.9×", "90.1 ± 0.2", "1.00e-04"], ["−12.00", None, "8.0 %", "12,800"]],
    )
    assert table.splitlines()[2:] == [
        " +0.35  3.9×  90.1 ± 0.2  1.00e-04",
        "−12.00     –       8.0 %    12,800",
    ]


def test_one_word_makes_a_column_text():
    assert format_table(["a"], [["10"], ["ten"], ["1"]]).splitlines()[2:] == ["10", "ten", "1"]


def test_no_line_ends_in_spaces():
    table = format_table(["name", "note"], [["x", ""], ["longer", "yes"]])
    assert all(line == line.rstrip() for line in table.splitlines())


def test_no_rows_leave_the_headers():
    assert format_table(["a", "bb"], []) == "a  bb\n-  --"


def test_names_do_not_reach_the_terminal_raw():
    assert format_table(["class"], [["cat\x1b[2J"]]).endswith("cat\\x1b[2J")
