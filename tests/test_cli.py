"""Options: what they become, and which errors are found in them without torch."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ffnet_quanteval
from ffnet import cli
from ffnet.config import Config
from ffnet.file_names import PROGRESS_FOLDER
from ffnet.options import OPTIONS, option_values
from ffnet.system.errors import UserError
from ffnet.variants import DEMO_VARIANTS, MODEL_GROUPS
from tests.helpers.program import SCRIPT

ERRORS = {
    "--model-name segmentation_ffnet78s_dBBB_mobile": "Did you mean segmentation_ffnet78S_dBBB_mobile",
    "--model-name segmentation_ffnet78S_dBBB": "Did you mean segmentation_ffnet",
    "--model-name published segmentation_ffnet78S_dBBB": "Did you mean segmentation_ffnet",
    "--model-name published --checkpoint weights.pth": "this is the file of one model, and --model-name has 5",
    "--model-name published --encodings weights.pth": "--encodings are those of one model",
    "--model-name published --output-dir out --export out/in": "inside the folder of --output-dir",
    "--models-at-once 0": "at least 1",
    "--resume": "--resume has no effect without --output-dir",
    "--resume --output-dir full": "already holds thesis.txt",
    "--resume --model-name published --output-dir models": "already holds thesis.txt",
    "--onnx weights.pth --models-at-once 2": "--models-at-once cannot be combined with --onnx",
    "--use-cuda maybe": "Give one of true",
    "--batch-size 0": "from 1 to 4096",
    "--batch-size x": "from 1 to 4096",
    "--batch-size 99999999999999999999": "from 1 to 4096",
    "--num-workers -1": "from 0 to 256",
    "--num-workers 100000": "from 0 to 256",
    "--limit 0": "at least 1",
    "--default-param-bw 3": "from 4 to 16",
    "--default-output-bw 32": "from 4 to 16",
    "--quant-scheme minmax": "choose from",
    "--split test": "choose from",
    "--checkpoint /nowhere.pth": "--checkpoint /nowhere.pth: there is no such file",
    "--demo": "cannot be combined with --dataset-path",
    "--unknown": "unrecognized arguments",
    "--model segmentation_ffnet78S_dBBB_mobile": "unrecognized arguments",
    "--onnx weights.pth --model-name segmentation_ffnet14T_dBBB_mobile": "--model-name cannot be combined with --onnx",
    "--onnx nothing.onnx": "nothing.onnx: there is no such file",
    "--encodings nothing.json": "nothing.json: there is no such file",
    "--partial-encodings": "has no effect without --encodings",
    "--fail-under -1": "from 0 to 100",
    "--fail-under x": "from 0 to 100",
    "--export out --default-param-bw 5": "5 bits",
    "--export out --output-dir out/in": "inside the folder of --export",
    "--output-dir same --save-predictions same": "Name a folder beside it",
    "--onnx weights.pth --fail-under 0": "--fail-under cannot be combined with --onnx",
    "--onnx weights.pth --no-cle": "--cle cannot be combined with --onnx",
    "--onnx weights.pth --use-cuda": "--use-cuda cannot be combined with --onnx",
    "--onnx-input 0-1": "--onnx-input has no effect without --onnx",
    "--onnx-channels bgr": "--onnx-channels has no effect without --onnx",
    "--onnx weights.pth --onnx-input 0-2": "choose from",
    "--encodings weights.pth --quant-scheme tf": "--quant-scheme cannot be combined with --encodings",
    "--encodings weights.pth --calibration-split val": "--calibration-split cannot be combined with --encodings",
    "--encodings weights.pth --default-param-bw 8": "--default-param-bw cannot be combined with --encodings",
    "--encodings weights.pth --max-drop 0": "--max-drop cannot be combined with --encodings",
    "--encodings weights.pth --adaround": "--adaround cannot be combined with --encodings",
    "--onnx weights.pth --max-drop 1": "--max-drop cannot be combined with --onnx",
    "--seq-mse": "at most 4 bits, and --default-param-bw is 8",
    "--seq-mse --max-drop 1 --default-param-bw 4": "--max-drop tries sequential MSE by itself",
    "--max-drop -1": "from 0 to 100",
    "--max-drop 1 --default-param-bw 6": "remove --max-drop",
    "--max-drop 1 --default-output-bw 4": "remove --max-drop",
    "--max-drop 1 --default-param-bw 16 --default-output-bw 16": "int32 biases overflow",
    "--adaround 0": "from 1 to 1000000",
    "--adaround x": "not a whole number",
    "--recovery-images 4": "has no effect without --max-drop or --seq-mse or --adaround",
    "--selection-images 4": "has no effect without --max-drop",
    "--adaround --recovery-images 0": "at least 1",
    "--worst 3": "has no effect without --output-dir",
    "--sensitivity-images 2": "has no effect without --sensitivity",
    "--output-dir=": "is empty",
    "--worst -1": "at least 0",
    "--sensitivity-images 0": "at least 1",
    "--output-dir full": "already holds thesis.txt",
    "--save-predictions full": "already holds thesis.txt",
    "--export full": "already holds thesis.txt",
    "--npu sm8570": "Did you mean",
    "--npu-images 5": "has no effect without --npu",
    "--npu-fallback": "has no effect without --npu",
    "--npu --npu-images 0": "at least 1",
    "--npu --default-param-bw 5": "5 bits",
}


@pytest.mark.parametrize("words", ERRORS)
def test_errors_name_the_option_and_end_with_status_2(tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").touch()
    for folder in (tmp_path / "full", tmp_path / "models" / "segmentation_ffnet54S_dBBB_mobile"):
        folder.mkdir(parents=True)
        (folder / "thesis.txt").touch()
    assert ffnet_quanteval.main(["--dataset-path", str(tmp_path), *words.split()]) == 2
    error = capsys.readouterr().err
    assert ERRORS[words] in error and error.count("\n") == 1


def test_missing_images_are_an_error(capsys, monkeypatch):
    monkeypatch.delenv("CITYSCAPES_DATASET", raising=False)
    assert ffnet_quanteval.main([]) == 2
    assert "--dataset-path is missing" in capsys.readouterr().err


def test_defaults_are_the_published_configuration(monkeypatch):
    config = cli.parse_args(["--dataset-path", "cityscapes"])
    assert config == dataclasses.replace(
        Config(),
        data=dataclasses.replace(config.data, dataset_path=Path("cityscapes")),
        command="python ffnet_quanteval.py --dataset-path cityscapes",
    )
    assert (config.quantization.param_bw, config.quantization.output_bw, config.quantization.cle) == (8, 8, True)


def test_the_demo_has_defaults_of_its_own(tmp_path):
    config = cli.parse_args(["--demo"])
    assert config.model.names == DEMO_VARIANTS[:1] and config.output.execute
    assert not cli.parse_args(["--demo", "--no-execute"]).output.execute
    (tmp_path / "x.onnx").touch()
    assert not cli.parse_args(["--demo", "--onnx", str(tmp_path / "x.onnx")]).output.execute


def test_several_models_can_be_named_in_groups_and_count_once():
    def names(*words):
        return cli.parse_args(["--dataset-path", "cityscapes", *words]).model.names

    first, second = MODEL_GROUPS["published"][:2]
    assert names("--model-name", "published") == MODEL_GROUPS["published"] and len(MODEL_GROUPS["published"]) == 5
    assert len(names("--model-name", "all")) == 66 and set(DEMO_VARIANTS).isdisjoint(names("--model-name", "all"))
    assert names("--model-name", second, first, second) == names("--model-name", second, "--model-name", first)
    assert names("--model-name", second, "published")[:2] == (second, first)


def test_the_demo_has_weights_for_its_own_models_only(capsys):
    assert cli.parse_args(["--demo", "--model-name", *DEMO_VARIANTS]).model.names == DEMO_VARIANTS
    assert ffnet_quanteval.main(["--demo", "--model-name", DEMO_VARIANTS[0], "published"]) == 2
    assert f"--model-name {MODEL_GROUPS['published'][0]}: --demo has weights for" in capsys.readouterr().err


def test_each_of_several_models_has_folders_of_its_own():
    words = ["--output-dir", "o", "--export", "e", "--model-name"]
    one, two = (cli.parse_args(["--demo", *words, *DEMO_VARIANTS[:number]]) for number in (1, 2))
    assert one.for_model(DEMO_VARIANTS[0]) == one
    own = two.for_model(DEMO_VARIANTS[1])
    assert own.model.name == DEMO_VARIANTS[1] and own.output.save_predictions is None
    assert (own.output.output_dir, own.output.export) == (Path("o", DEMO_VARIANTS[1]), Path("e", DEMO_VARIANTS[1]))
    assert option_values(own)["model_name"] == DEMO_VARIANTS[1]
    assert option_values(two)["model_name"] == " ".join(DEMO_VARIANTS)


def test_a_resumed_run_may_find_its_own_files(tmp_path):
    folders = {name: tmp_path / name for name in ("one", "two")}
    for name in DEMO_VARIANTS:
        (folders["two"] / name / PROGRESS_FOLDER).mkdir(parents=True)
    (folders["one"] / PROGRESS_FOLDER).mkdir(parents=True)
    for path in (folders["one"] / "result.json", folders["two"] / "comparison.csv"):
        path.touch()
    for number, name in enumerate(folders, 1):
        words = ["--demo", "--model-name", *DEMO_VARIANTS[:number], "--output-dir", str(folders[name])]
        assert cli.parse_args([*words, "--resume"]).output.resume
        with pytest.raises(UserError, match=r"already holds .*\. Add --resume to go on .* or add --force"):
            cli.parse_args(words)


def test_the_dataset_path_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("CITYSCAPES_DATASET", "/data")
    assert cli.parse_args([]).data.dataset_path == Path("/data")
    assert cli.parse_args(["--dataset-path", "/other"]).data.dataset_path == Path("/other")


def test_every_field_of_the_config_has_one_option():
    targets = [option.target for group in OPTIONS.values() for option in group]
    sections = ("model", "data", "quantization", "npu", "runtime", "output")
    fields = [f"{name}.{field.name}" for name in sections for field in dataclasses.fields(getattr(Config(), name))]
    assert sorted(targets) == sorted([*fields, "list_models"])


def test_option_values_include_defaults_and_can_be_written_as_json():
    values = option_values(cli.parse_args(["--demo", "--cache-dir", "/tmp/x", "--default-param-bw", "4"]))
    assert values["cache_dir"] == "/tmp/x" and values["default_param_bw"] == 4 and values["batch_size"] == 8


def test_a_repeated_command_quotes_what_the_shell_would_split():
    assert cli.parse_args(["--demo", "--output-dir", "my results"]).command.endswith("--output-dir 'my results'")


@pytest.mark.parametrize(
    ("options", "chip", "images"),
    (
        ([], None, 50),
        (["--npu"], "sm8750", 50),
        (["--npu", "Snapdragon-8-Gen-3", "--npu-images", "all"], "sm8650", "all"),
        (["--npu", "qcs6490", "--npu-images", "3"], "qcs6490", 3),
    ),
)
def test_the_chip_is_a_part_name_and_sm8750_if_none_is_named(options, chip, images, monkeypatch):
    monkeypatch.setattr(cli, "check_npu_package", lambda: None)
    npu = cli.parse_args(["--demo", *options]).npu
    assert (npu.chip, npu.images) == (chip, images)


def test_a_missing_npu_package_is_reported_before_torch_is_imported():
    script = "import sys; sys.modules['onnxruntime_qnn'] = None; import importlib.util, ffnet_quanteval\n"
    script += "importlib.util.find_spec = lambda *_: None\n"
    script += "print(ffnet_quanteval.main(['--demo', '--npu']), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["2", "False"] and "--npu: onnxruntime-qnn " in run.stderr


def test_the_chips_are_listed_without_importing_torch():
    script = "import sys, ffnet_quanteval\nassert ffnet_quanteval.main(['--npu', 'list']) == 0\n"
    script += "assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", script], cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[0].split() == ["part", "name", "soc_model", "architecture"]
    assert "Snapdragon 8 Elite " in run.stdout


def test_a_reader_of_the_list_of_chips_may_close_the_pipe(monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as closed_pipe:
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        assert ffnet_quanteval.main(["--npu", "list"]) == 0


def test_names_that_are_not_utf8_are_refused():
    with pytest.raises(UserError, match="not valid UTF-8"):
        cli.parse_args(["--demo", "--output-dir", "a\udcff"])


def test_help_imports_neither_torch_nor_numpy():
    script = "import sys, ffnet_quanteval\ntry: ffnet_quanteval.main(['--help'])\nexcept SystemExit: pass\n"
    script += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", script], cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    assert "--dataset-path" in run.stdout and "(default: 8)" in run.stdout


def test_the_objects_of_imported_modules_are_left_out_of_garbage_collection_once():
    """A second run in the process must not keep what the first one left."""
    script = "import gc, ffnet_quanteval; counts = []\n"
    script += "for _ in range(2): ffnet_quanteval.main(['--list-models']); counts.append(gc.get_freeze_count())\n"
    script += "assert gc.isenabled() and counts[0] >= counts[1] > 100_000, counts"
    subprocess.run([sys.executable, "-c", script], cwd=SCRIPT.parent, stdout=subprocess.DEVNULL, check=True)
