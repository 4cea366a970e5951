"""The comparison with an earlier run: by hand on four images, and what the program prints, writes and refuses."""

import hashlib
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

import ffnet_quanteval
from ffnet.config import PROGRESS_FOLDER
from ffnet.evaluation.scores import NPU, SIMULATED, BackendNames, Shard
from ffnet.options import parse_args
from ffnet.run.baseline import ScoredRun
from ffnet.run.earlier import FINISHED
from ffnet.run.progress import phase_titles
from tests.helpers.names import INT8_SIMULATED
from tests.helpers.networks import TOY
from tests.helpers.program import arguments, run_with_result

STUDENT_T = 3.18244630528  # of 95 % with three degrees of freedom, from a table
BEFORE, AFTER = (0, 1, 2, 1), (1, 1, 4, 2)  # pixels of class 0 that are predicted as class 1


def shard(indices, errors, *backends):
    """Return scores of images with 8 pixels of each of two classes."""
    matrices = np.array([[[8 - wrong, wrong], [0, 8]] for wrong in errors], np.int64)
    return Shard(np.array(indices), SimpleNamespace(confusion_matrices=dict.fromkeys(backends, matrices)))


def miou(errors):
    pixels, wrong = 8 * len(errors), sum(errors)
    return 50 * ((pixels - wrong) / pixels + pixels / (pixels + wrong))


def without(errors, position):
    return errors[:position] + errors[position + 1 :]


def test_the_paired_change_is_that_of_four_images_by_hand(tmp_path):
    earlier = {"images": shard(range(4), BEFORE, SIMULATED), "npu-a": shard((9, 1, 3, 7, 5), (8, *BEFORE), NPU)}
    now = {"images": shard(range(4), AFTER, "FP32", SIMULATED), "npu-a": shard((1, 3, 7, 5), AFTER, SIMULATED, NPU)}
    run = ScoredRun(tmp_path, SimpleNamespace(model="m", precision="W4A8"), earlier)
    found = run.compare(now | {"npu-b": now["npu-a"]}, BackendNames("INT8"))
    changes = [miou(without(AFTER, i)) - miou(without(BEFORE, i)) for i in range(4)]
    reach = STUDENT_T * math.sqrt(3 / 4 * sum((each - sum(changes) / 4) ** 2 for each in changes))
    assert [(each.backend, each.baseline_backend) for each in found.changes] == [
        (INT8_SIMULATED, "W4A8 simulated"), ("INT8 NPU, a", "W4A8 NPU"),
    ]  # fmt: skip
    for each in found.changes:  # on the NPU, on the images that both runs have
        change = miou(AFTER) - miou(BEFORE)
        assert each.images == 4 and [each.baseline_miou, each.miou] == pytest.approx([miou(BEFORE), miou(AFTER)])
        assert [each.change, *each.change_interval] == pytest.approx([change, change - reach, change + reach])


def test_a_run_is_compared_with_an_earlier_one_which_it_leaves_alone(tree, toy_checkpoint, tmp_path, capsys):
    first, options = tmp_path / "first", arguments(tree, toy_checkpoint)
    before = run_with_result(options, first)
    capsys.readouterr()
    files = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    low_bits = [*options, "--default-param-bw", "4", "--baseline", first, "--fail-under", "0"]
    assert ffnet_quanteval.main([*map(str, low_bits), "--output-dir", str(tmp_path / "second")]) == 1
    out, err = capsys.readouterr()
    after = json.loads((tmp_path / "second" / "result.json").read_text())
    fp32, simulated = after["baseline"]["changes"]
    assert fp32["change"] == 0 and fp32["change_interval"] == [0, 0] and before["baseline"] is None
    labelled = [r["backends"][f"{p} simulated"]["labelled_miou"] for r, p in ((before, "INT8"), (after, "W4A8"))]
    assert simulated["change"] == pytest.approx(labelled[1] - labelled[0])
    page = (tmp_path / "second" / "report.html").read_text()
    assert f"against {first}" in out and f"against {first}" in page and 'id="baseline"' in page
    drop = f"--fail-under 0: the mIoU drop of W4A8 simulated since --baseline {first} is {-simulated['change']:.2f}"
    assert (drop in err) == (simulated["change"] < 0)
    assert files == {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    titles = phase_titles(parse_args([*map(str, low_bits), "--output-dir", "out"]))
    digest = hashlib.sha256(toy_checkpoint.read_bytes()).hexdigest()
    said = f"{TOY.name}, FP32 and W4A8,", f"{toy_checkpoint} (sha256 {digest[:12]})", f"4 images of {tree}, 64x128"
    assert all(text in err for text in said)
    assert [line for line in err.splitlines() if re.match(r"\[\d", line)] == list(titles.values())

    assert ffnet_quanteval.main([*map(str, options), "--output-dir", str(first)]) == 0  # replaces its own results
    assert ffnet_quanteval.main([*map(str, options), "--output-dir", str(first), "--worst", "1"]) == 2
    assert "Add --resume" in capsys.readouterr().err
    refused = {
        "--limit 3": f"--baseline {first}: that run scored other images or labels (4; this one scores 3).",
        f"--output-dir {first} --force": f"--output-dir {first}: this is inside the folder of --baseline",
    }
    for words, message in refused.items():
        assert ffnet_quanteval.main([*map(str, options), "--baseline", str(first), *words.split()]) == 2
        assert message in capsys.readouterr().err
    (first / PROGRESS_FOLDER / FINISHED).unlink()
    assert ffnet_quanteval.main([*map(str, options), "--baseline", str(first)]) == 2
    assert f"--baseline {first}: this folder holds no finished run." in capsys.readouterr().err
