"""Numbers, names and tables in messages, worked by hand."""

from ffnet.system.text import (
    count,
    decimals,
    format_interval,
    format_number,
    format_table,
    list_names,
    printable,
    runtime_reason,
)


def test_counts_agree_with_their_nouns():
    assert [count(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]


def test_what_controls_a_terminal_is_escaped_and_letters_are_kept():
    assert printable("Köln 東京 \N{BICYCLE} 'a' 1.5 %") == "Köln 東京 \N{BICYCLE} 'a' 1.5 %"
    hostile = "\x1b[2J\r\n\x00\x7f\x9b\u202e\u2066\u2028\udcff"
    escaped = r"\x1b[2J\r\n\x00\x7f\x9b\u202e\u2066\u2028\udcff"
    assert printable(hostile) == escaped and printable(escaped) == escaped
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


def test_long_lists_are_shortened():
    assert list_names(("a", "b")) == "a, b"
    assert list_names(("a", "b", "c"), most=2) == "a, b and 1 more"
    assert list_names(["x" * 100]) == "x" * 80


def test_numbers_have_their_decimals_and_no_negative_zero():
    assert [format_number(value) for value in (None, 1.005, -0.001, 12)] == ["-", "1.00", "0.00", "12.00"]
    assert format_number(0.25, 1, "+") == "+0.2" and format_number(-0.25, 1, "+") == "-0.2"
    assert format_interval((-0.001, 2.5)) == "[0.00, 2.50]" and format_interval(None) == "-"


def test_tables_align_the_first_column_to_the_left_and_the_others_to_the_right():
    assert format_table([("backend", "mIoU"), ("FP32", "79.20"), ("x", "-")]).splitlines() == [
        "backend   mIoU",
        "FP32     79.20",
        "x            -",
    ]


def test_a_cell_stays_in_its_line_of_the_table():
    assert format_table([("layer", "bits"), ("a\nb\x1b[A", "8")]).splitlines() == [
        "layer       bits",
        r"a\nb\x1b[A     8",
    ]


def test_the_reason_of_onnx_runtime_is_one_line_without_its_number():
    error = RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Load model failed: no node\nsecond line")
    assert runtime_reason(error) == "Load model failed: no node"
    assert runtime_reason(ValueError("plain")) == "plain"


def test_decimals_are_added_where_rounding_would_hide_a_change_or_a_limit():
    assert decimals(84.734, (84.736, 0.002, None)) == 3  # 84.73 -> 84.74, +0.00
    assert decimals(84.731, (84.721, -0.01, None)) == 2
    assert decimals(None, (None, -0.05, (-0.1, -0.004))) == 3
    assert decimals(None, (None, 0.0, (0.0, 0.0)), (None, None, None)) == 2
