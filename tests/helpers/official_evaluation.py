"""The official Cityscapes evaluation, run as its users run it."""

import json
import subprocess
import sys


def official_evaluation(root, results):
    """Return what `csEvalPixelLevelSemanticLabeling` writes about the predictions in `results`."""
    output = results / "official.json"
    script = (
        "import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as official;"
        f"official.args.exportFile = {str(output)!r}; official.args.evalInstLevelScore = False; official.main()"
    )
    environment = {"CITYSCAPES_DATASET": str(root), "CITYSCAPES_RESULTS": str(results), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)
    return json.loads(output.read_text().replace("NaN", "null"), object_hook=_nan_for_null)


def _nan_for_null(entry):
    return {key: float("nan") if value is None else value for key, value in entry.items()}
