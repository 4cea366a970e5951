"""The Python API, by the lines that the README shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ffnet
from demo.streetscenes.scenes import ensure_scenes
from ffnet.checkpoints.download import default_cache_dir
from ffnet.system.errors import UserError
from tests.helpers.networks import DEMO, demo_checkpoint, toy_model

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text()


@pytest.mark.slow
def test_the_readmes_lines_run(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "demo").symlink_to(CHECKOUT / "demo")
    (tmp_path / "scenes").symlink_to(ensure_scenes(default_cache_dir(), False).parent)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("limit=8", "limit=2"), "README.md", "exec"), {})
    fp32, int8 = map(float, capsys.readouterr().out.split())
    assert 50 < fp32 < 100 and abs(fp32 - int8) < 1


def test_every_public_name_can_be_imported_and_is_documented():
    for name in ffnet.__all__:
        assert getattr(ffnet, name).__doc__, name


def test_dir_lists_the_public_api():
    assert dir(ffnet) == sorted([*ffnet.__all__, "__version__"])


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ffnet.nonsense  # noqa: B018


IMAGE, LABEL = torch.zeros(3, 64, 128, dtype=torch.uint8), torch.zeros(64, 128, dtype=torch.uint8)
SAMPLES = [(IMAGE, LABEL)]
WRONG = {
    "load_checkpoint: name": (lambda model: ffnet.load_checkpoint("ffnet40S", "x"), "mean segmentation_ffnet40S_dBBB"),
    "load_checkpoint: path": (lambda model: ffnet.load_checkpoint(DEMO, None), "path: this is of type NoneType. Give"),
    "build_model": (lambda model: ffnet.build_model("ffnet78"), "Did you mean segmentation_ffnet78S_dBBB_mobile"),
    "build_model: classes": (lambda model: ffnet.build_model(DEMO, classes=1), "classes: this is 1. Give a number"),
    "quantize: checkpoint": (lambda model: ffnet.quantize("x.pth", SAMPLES), "model: this is of type str"),
    "quantize: training": (lambda model: ffnet.quantize(model.train(), SAMPLES), "model: .* Call its eval"),
    "quantize: no images": (lambda model: ffnet.quantize(model, None), "images: calibration needs images"),
    "quantize: config": (lambda model: ffnet.quantize(model, SAMPLES, {"cle": False}), "config: .* dict. Give a Quant"),
    "quantize: runtime": (lambda model: ffnet.quantize(model, SAMPLES, runtime="cpu"), "runtime: .* str. Give a Run"),
    "lower": (lambda model: ffnet.lower(model), "sim: this is of type FFNet. Give the `sim`"),
    "evaluate: model": (lambda model: ffnet.evaluate(model, SAMPLES), "backends: .* FFNet. Give at least one by its"),
    "evaluate: checkpoint": (lambda model: ffnet.evaluate({"A": "x.pth"}, SAMPLES), "backend 'A': this is of type str"),
    "evaluate: training": (lambda model: ffnet.evaluate({"A": model.train()}, SAMPLES), "backend 'A': .* eval"),
    "evaluate: runtime": (lambda model: ffnet.evaluate({"A": model}, SAMPLES, "cpu"), "runtime: .* Give a Runtime"),
    "evaluate: loader": (lambda model: ffnet.evaluate({"A": model}, iter(SAMPLES)), "images: .* Give a data set"),
    "Runtime: device": (lambda model: ffnet.Runtime("gpu"), "device must be cpu or cuda"),
    "Runtime: batch_size": (lambda model: ffnet.Runtime(batch_size=0), "batch_size at least 1"),
    "QuantizationConfig: bits": (lambda model: ffnet.QuantizationConfig(param_bw=33), "must be 4 to 32"),
    "QuantizationConfig: scheme": (lambda model: ffnet.QuantizationConfig(quant_scheme="x"), "'tf_enhanced' or 'tf'"),
}


@pytest.mark.parametrize("call, message", WRONG.values(), ids=WRONG)
def test_a_wrong_argument_gets_one_line_that_names_it(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(toy_model())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    "sample", ["x", (IMAGE,), (IMAGE / 255, LABEL), (IMAGE[:1], LABEL), (IMAGE.permute(1, 2, 0), LABEL), (IMAGE, 7)]
)
def test_a_data_set_of_other_samples_is_refused(sample, batch_size):
    with pytest.raises(UserError, match="images: a sample is .*. Each must be an image and its train ids"):
        ffnet.evaluate({"FP32": toy_model()}, [sample] * 2, ffnet.Runtime(batch_size=batch_size, quiet=True))


def test_int64_labels_and_a_torch_device_are_taken():
    label = torch.arange(64 * 128).reshape(64, 128) % 20 - 1  # -1 is not scored
    expected = torch.where(label < 0, 255, label).byte()
    runtime = ffnet.Runtime(torch.device("cpu"), quiet=True)
    scores = [ffnet.evaluate({"A": toy_model()}, [(IMAGE, ids)] * 2, runtime).total("A") for ids in (label, expected)]
    assert (scores[0] == scores[1]).all() and scores[0].sum() == 2 * (label >= 0).sum()


def test_repr_of_a_checkpoint_and_of_a_quantized_network_is_short():
    checkpoint = ffnet.load_checkpoint(DEMO, demo_checkpoint(DEMO))
    network = ffnet.quantize(toy_model(), SAMPLES, runtime=ffnet.Runtime(quiet=True))
    assert len(repr(checkpoint)) < 500 and "form='state_dict'" in repr(checkpoint)
    assert len(repr(network)) < 500 and "calibration_images=1" in repr(network)


FOREIGN = """
import sys
import datasets  # another package of this name, as Hugging Face's
assert datasets.FOREIGN
import torch
import ffnet
from tests.helpers.networks import DEMO, demo_checkpoint

class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.randint(256, (3, 64, 128), dtype=torch.uint8), torch.randint(19, (64, 128))

model = ffnet.load_checkpoint(DEMO, demo_checkpoint(DEMO)).model
network = ffnet.quantize(model, Noise())
scores = ffnet.evaluate({"FP32": model, "INT8": network.lowered, "again": ffnet.lower(network.sim)}, Noise())
print(scores.images, sys.modules["datasets"] is datasets)
"""


def test_the_library_works_where_another_package_is_named_datasets(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("FOREIGN = True")
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": paths}
    ran = subprocess.run([sys.executable, "-c", FOREIGN], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.stdout == "2 True\n", ran.stderr[-2000:]


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
