"""The measurement of the work that does not depend on the images: what it prints of given times."""

from benchmarks.fixed_work import OUTSIDE_STAGES, FixedWork, table


def test_the_table_has_medians_of_all_rounds():
    rounds = [FixedWork(run, 2 * run, {"calibrate": run / 2, "evaluate": 1.0}) for run in (4.0, 10.0, 6.0)]
    assert dict(table(rounds)[1:]) == {
        "calibrate": "3.00",
        "evaluate": "1.00",
        OUTSIDE_STAGES: "2.00",
        "whole run": "6.00",
        "processor time of the whole run": "12.00",
    }
