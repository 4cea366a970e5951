"""Which bit widths an export accepts."""

import pytest

from ffnet.options import OUTPUT_BIT_WIDTHS, PARAM_BIT_WIDTHS, check_bit_widths
from ffnet.system.errors import UserError


@pytest.mark.parametrize(
    ("widths", "option"),
    (((5, 8), "--default-param-bw"), ((8, 4), "--default-output-bw"), ((8, 31), "--default-output-bw"), ((16, 16), "")),
)
def test_bit_widths_that_onnx_runtime_cannot_run_are_refused(widths, option):
    with pytest.raises(UserError, match=f"{option}.*bits"):
        check_bit_widths(*widths)


def test_all_other_combinations_are_accepted():
    for param_bw in PARAM_BIT_WIDTHS:
        for output_bw in OUTPUT_BIT_WIDTHS:
            if (param_bw, output_bw) != (16, 16):
                check_bit_widths(param_bw, output_bw)
