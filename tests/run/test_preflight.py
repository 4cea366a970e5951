"""Errors in files and folders are found before the work, without torch."""

import os
import shutil
import subprocess
import sys

import pytest

from datasets import DatasetError
from ffnet.config import PROGRESS_FOLDER
from ffnet.options import parse_args
from ffnet.run import preflight
from ffnet.system.errors import UserError
from ffnet.variants import DEMO_VARIANTS
from tests.helpers.program import SCRIPT

ERRORS = {
    "--model-name published --checkpoint weights.pth": "this is the file of one model, and --model-name has 5",
    "--model-name published --encodings weights.pth": "--encodings belongs to one model",
    "--checkpoint /nowhere.pth": "--checkpoint /nowhere.pth: there is no such file",
    "--onnx nothing.onnx": "nothing.onnx: there is no such file",
    "--encodings full": "--encodings full: it is a folder, not a file",
    "--config-file pipe": "--config-file pipe: it is a pipe, not a file",
    "--onnx pipe": "--onnx pipe: it is a pipe, not a file",
    "--model-name published --output-dir out --export out/in": "inside the folder of --output-dir",
    "--output-dir same --save-predictions same": "Name a folder beside it",
    "--output-dir full": "already holds thesis.txt",
    "--export full": "already holds thesis.txt",
    "--resume --output-dir full": "already holds thesis.txt",
    "--resume --model-name published --output-dir models": "already holds thesis.txt",
}
READS_NAMES_AND_HEADERS = """
import sys
from datasets.cityscapes import CityscapesSplit
from ffnet.options import parse_args
from ffnet.run import preflight
preflight.check(parse_args(["--dataset-path", sys.argv[1], "--output-dir", sys.argv[2]]))
split = CityscapesSplit(sys.argv[1], "val").select([0, 1])
print(len(split), split.size, split.names, {"torch", "aimet_torch", "onnxruntime"} & sys.modules.keys())
"""


def check(*words):
    preflight.check(parse_args(words))


@pytest.mark.parametrize("words", ERRORS)
def test_files_and_folders_that_cannot_be_used_are_named(tree, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").touch()
    os.mkfifo(tmp_path / "pipe")
    for folder in (tmp_path / "full", tmp_path / "models" / "segmentation_ffnet54S_dBBB_mobile"):
        folder.mkdir(parents=True)
        (folder / "thesis.txt").touch()
    with pytest.raises(UserError) as error:
        check("--dataset-path", str(tree), *words.split())
    assert ERRORS[words] in str(error.value)


@pytest.mark.parametrize("models", (1, 2))
def test_a_resumed_run_may_find_its_own_files(tmp_path, models):
    names = DEMO_VARIANTS[:models]
    for folder in [tmp_path / name for name in names] if models > 1 else [tmp_path]:
        (folder / PROGRESS_FOLDER).mkdir(parents=True)
    (tmp_path / ("comparison.csv" if models > 1 else "result.json")).touch()
    words = ["--demo", "--model-name", *names, "--output-dir", str(tmp_path)]
    check(*words, "--resume")
    with pytest.raises(UserError, match=r"already holds .*\. Add --resume to continue .* or add --force"):
        check(*words)


def test_every_split_that_is_read_is_checked(tree):
    shutil.rmtree(tree / "gtFine" / "train")
    check("--dataset-path", str(tree))
    with pytest.raises(DatasetError, match="gtFine/train: this folder does not exist"):
        check("--dataset-path", str(tree), "--calibration-split", "train")


def test_names_and_headers_are_read_without_torch(tree):
    command = [sys.executable, "-c", READS_NAMES_AND_HEADERS, tree, tree / "out"]
    ran = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    assert ran.stdout.split(maxsplit=3)[:3] == ["2", "(64,", "128)"] and ran.stdout.endswith(" set()\n")
    assert not (tree / "out").exists()


def test_a_missing_npu_package_is_reported_before_torch_is_imported():
    script = "import sys, importlib.util, ffnet_quanteval\nimportlib.util.find_spec = lambda *_: None\n"
    script += "print(ffnet_quanteval.main(['--demo', '--npu']), 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["2", "False"] and "--npu: onnxruntime-qnn " in ran.stderr
