"""Runs of the program inside the test's process."""

import json
from pathlib import Path

import ffnet_quanteval
from tests.helpers.networks import TOY

SCRIPT = Path(ffnet_quanteval.__file__)


def arguments(tree, checkpoint, *more, model=TOY.name):
    """The options of a small run on a CPU, and `more` of them."""
    return ["--model-name", model, "--dataset-path", str(tree), "--checkpoint", str(checkpoint),
            "--use-cuda", "false", "--batch-size", "2", "--num-workers", "0", *map(str, more)]  # fmt: skip


def run_with_result(options, folder):
    """Run the program with --output-dir `folder`, check that it succeeds, and return what result.json holds."""
    status = ffnet_quanteval.main([*map(str, options), "--output-dir", str(folder)])
    assert status == 0
    return json.loads((Path(folder) / "result.json").read_text())
