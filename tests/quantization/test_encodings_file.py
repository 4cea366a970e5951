"""Encodings files of every format, and what is refused of malformed ones."""

import json
import re

import pytest

from ffnet.quantization.encodings_file import LARGEST_FILE, read_encodings
from ffnet.system.errors import UserError
from tests.helpers.encodings_files import PLAIN, write


def legacy(**fields):
    entry = {key: value for key, value in (PLAIN | fields).items() if value is not None}
    return {"activation_encodings": {"relu": {"output": {"0": entry}}}, "param_encodings": {}}


def listed(**fields):
    entry = {"name": "x", "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False, "bw": 8, "scale": [0.1]}
    entry |= {"offset": [-3]} | fields
    return {"version": "1.0.0", "activation_encodings": [entry], "param_encodings": []}


def newest(**fields):
    return {"version": "2.0.0", "encodings": [{"name": "x", "output_dtype": "uint8", "y_scale": 0.1} | fields]}


MALFORMED = (
    ("", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    (json.dumps(legacy()).replace("0.01", "9" * 5000), "digits"),
    (json.dumps(legacy()).replace("0.01", "NaN"), "'nan', which is not a number"),
    ('{"encodings": [], "encodings": []}', "'encodings' twice"),
    ({"model": "ffnet"}, "the entry 'model' is neither an object nor a list"),
    ("{" + 1_600_001 * '"a":0,' + "}", "more than 1600000 values"),
    ({"activation_encodings": {}, "param_encodings": {}}, "contains no encodings"),
    ({"activation_encodings": 3, "param_encodings": []}, "has 3 in place of encodings"),
    ({"version": "3.0.0", "encodings": []}, "version '3.0.0'"),
    ({"version": "2.0.0", "encodings": newest()["encodings"] * 2}, "'x' twice"),
    ({"activation_encodings": {"a": {"output": 3}}, "param_encodings": {}}, "'a' has no tensors under 'output'"),
    ({"activation_encodings": {}, "param_encodings": {"a": [PLAIN, PLAIN | {"bitwidth": 4}]}}, "'a' has channels"),
    (legacy(scale=None), "'relu output 0' has 'scale' 'None', which is not a number"),
    (legacy(scale=0.0), "a scale of 0"),
    (legacy(offset=-1.5), "'offset' -1.5, which is not an integer"),
    (legacy(offset=1, min=0.01, max=2.56), "leaves 0 outside"),
    (legacy(min=-2.0), "a min of -2, but scale and offset give -1"),
    (legacy(max=[1.55, 1.55]), "scales and max of lengths 1 and 2"),
    (legacy(bitwidth=1), "bit width of 1"),
    (legacy(dtype="float", bitwidth=16), "dtype 'float'"),
    (legacy(is_symmetric="perhaps"), "neither true nor false"),
    (listed(enc_type="PER_BLOCK"), "neither PER_TENSOR"),
    (listed(scale=[0.1, 0.2], enc_type="PER_CHANNEL"), "scales and offsets of lengths 2 and 1"),
    (listed(scale=[0.1, 0.2], offset=[0, 0]), "is PER_TENSOR, but has 2 scales"),
    (listed(is_sym=True, offset=[0]), "symmetric with 8 bits, but has an offset of 0 in place of -128; if its"),
    (listed(is_sym=True, offset=[-128, 0], scale=[0.1] * 2, enc_type="PER_CHANNEL"), "an offset of 0 in place of -128"),
    (listed(is_sym=True, offset=[-127, -128], scale=[0.1] * 2, enc_type="PER_CHANNEL"), "offset of -127 in place of"),
    (legacy(is_symmetric="True", min=None, max=None, offset=0), "an offset of 0 in place of -128"),
    (newest(output_dtype="float8e4m3"), "output_dtype 'float8e4m3'"),
    (newest(block_size=16), "in blocks"),
)


@pytest.mark.parametrize("content, message", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_files_are_refused_with_a_reason(content, message, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=f"--encodings {re.escape(str(path))}: .*{message}"):
        read_encodings(path)


def test_files_in_every_format_are_read(tmp_path):
    for content in (legacy(), listed(), newest(), legacy(min=None, max=None), legacy(offset=-100.0)):
        (entry,) = read_encodings(write(tmp_path, content)).entries.values()
        assert (entry.qmin, entry.qmax) == (0, 255)


def test_files_in_another_encoding_are_refused_except_for_a_byte_order_mark(tmp_path):
    path = tmp_path / "x"
    path.write_text(json.dumps(newest()), encoding="utf-8-sig")
    assert list(read_encodings(path).entries) == ["x"]
    for encoding, reason in (("utf-16", "UTF-16 text"), ("utf-32", "UTF-16 text"), ("latin-1", "not UTF-8 text")):
        path.write_bytes(json.dumps(newest(name="é"), ensure_ascii=False).encode(encoding))
        with pytest.raises(UserError, match=f"--encodings {re.escape(str(path))}: the file is {reason}"):
            read_encodings(path)


def test_files_that_are_too_large_or_missing_are_refused(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    for wrong in (path, tmp_path, tmp_path / "absent.json"):
        with pytest.raises(UserError, match=f"--encodings {re.escape(str(wrong))}"):
            read_encodings(wrong)
