"""The Python API, by the lines that the README shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ffnet
from tests.helpers.networks import TOY, golden_state, toy_model

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.slow
def test_the_readmes_lines_run(tree, toy_variant, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace("segmentation_ffnet40S_dBBB_mobile", TOY.name)
    torch.save(golden_state(toy_model()), tree / "weights.pth")
    (tree / "cityscapes").symlink_to(tree)
    monkeypatch.chdir(tree)
    exec(compile(code, "README.md", "exec"), {})
    fp32, int8 = map(float, capsys.readouterr().out.split())
    assert 0 < fp32 < 100 and abs(fp32 - int8) < 5


def test_every_public_name_can_be_imported_and_is_documented():
    for name in ffnet.__all__:
        assert getattr(ffnet, name).__doc__, name


def test_dir_lists_the_public_api():
    assert dir(ffnet) == sorted([*ffnet.__all__, "__version__"])


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ffnet.nonsense  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    subprocess.run([sys.executable, "-c", "import sys, ffnet; assert 'torch' not in sys.modules"], check=True)


def test_onnx_runtime_writes_nothing_into_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    subprocess.run([sys.executable, "-c", "import ffnet.npu.worker"], check=True)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    code = "import os, ffnet; assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    subprocess.run([sys.executable, "-c", code], check=True)
