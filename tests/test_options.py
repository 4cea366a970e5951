"""Options: what they become, and which errors are found in them without torch."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import ffnet
import ffnet_quanteval
from ffnet.chips import CHIPS
from ffnet.config import Config
from ffnet.options import OPTIONS, option_values, parse_args
from ffnet.results.published import ai_hub_result
from ffnet.system.errors import UserError
from ffnet.variants import DEMO_VARIANTS, MODEL_GROUPS
from tests.helpers.program import SCRIPT
from tests.helpers.results import ZOO

ERRORS = {
    "--model-name segmentation_ffnet78s_dBBB_mobile": "Did you mean segmentation_ffnet78S_dBBB_mobile",
    "--resume": "--resume has no effect without --output-dir",
    "--use-cuda maybe": "Give one of true",
    "--batch-size 99999999999999999999": "from 1 to 4096",
    "--default-param-bw 3": "from 4 to 16",
    "--demo": "cannot be combined with --dataset-path",
    "--model segmentation_ffnet78S_dBBB_mobile": "--model: there is no such option. Did you mean --model-name?",
    "--outputdir=out": "--outputdir: there is no such option. Did you mean --output-dir?",
    "--onnx x --model-name segmentation_ffnet14T_dBBB_mobile": "--model-name cannot be combined with --onnx",
    "--onnx x --use-cuda": "--use-cuda cannot be combined with --onnx",
    "--onnx x --onnx-input 0-2": "choose from",
    "--onnx x --cle": "--cle has no effect with --onnx alone. Remove it, or add --encodings",
    "--onnx x --encodings y --calibration-split train": "--calibration-split has no effect with --onnx and --encodings",
    "--encodings x --quant-scheme tf": "--quant-scheme cannot be combined with --encodings",
    "--encodings x --max-drop 0": "--max-drop cannot be combined with --encodings",
    "--export out --default-param-bw 5": "5 bits",
    "--seq-mse": "at most 4 bits, and --default-param-bw is 8",
    "--seq-mse --max-drop 1 --default-param-bw 4": "--max-drop tries sequential MSE by itself",
    "--max-drop 1 --default-output-bw 4": "remove --max-drop",
    "--max-drop 1 --default-param-bw 16 --default-output-bw 16": "int32 biases overflow",
    "--recovery-images 4": "has no effect without --max-drop or --seq-mse or --adaround",
    "--output-dir=": "is empty",
    "--output-dir a\udcff": "not valid UTF-8",
    "--npu sm8570": "Did you mean",
    "--npu --npu-images 0": "at least 1",
}


@pytest.mark.parametrize("words", ERRORS)
def test_errors_name_the_option_and_end_with_status_2(tmp_path, capsys, words):
    assert ffnet_quanteval.main(["--dataset-path", str(tmp_path), *words.split()]) == 2
    error = capsys.readouterr().err
    assert ERRORS[words] in error and error.count("\n") == 1


def test_missing_images_are_an_error(capsys, monkeypatch):
    monkeypatch.delenv("CITYSCAPES_DATASET", raising=False)
    assert ffnet_quanteval.main([]) == 2
    assert "--dataset-path is missing" in capsys.readouterr().err


def test_defaults_are_the_published_configuration():
    config = parse_args(["--dataset-path", "cityscapes"])
    assert config == dataclasses.replace(
        Config(),
        data=dataclasses.replace(config.data, dataset_path=Path("cityscapes")),
        command="python ffnet_quanteval.py --dataset-path cityscapes",
    )
    assert (config.quantization.param_bw, config.quantization.output_bw, config.quantization.cle) == (8, 8, True)


def test_the_demo_has_defaults_and_weights_of_its_own():
    config = parse_args(["--demo"])
    assert config.model.names == DEMO_VARIANTS[:1] and config.output.execute
    assert not parse_args(["--demo", "--no-execute"]).output.execute
    assert not parse_args(["--demo", "--onnx", "x.onnx"]).output.execute
    assert parse_args(["--demo", "--model-name", *DEMO_VARIANTS]).model.names == DEMO_VARIANTS
    other = MODEL_GROUPS["published"][0]
    with pytest.raises(UserError, match=f"--model-name {other}: --demo has weights for"):
        parse_args(["--demo", "--model-name", DEMO_VARIANTS[0], "published"])


def test_several_models_can_be_named_in_groups_and_count_once():
    def names(*words):
        return parse_args(["--dataset-path", "cityscapes", *words]).model.names

    first, second = MODEL_GROUPS["published"][:2]
    assert names("--model-name", "published") == MODEL_GROUPS["published"] and len(MODEL_GROUPS["published"]) == 5
    assert len(names("--model-name", "all")) == 66 and set(DEMO_VARIANTS).isdisjoint(names("--model-name", "all"))
    assert names("--model-name", second, first, second) == names("--model-name", second, "--model-name", first)
    assert names("--model-name", second, "published")[:2] == (second, first)


def test_each_of_several_models_has_folders_of_its_own():
    words = ["--output-dir", "o", "--export", "e", "--model-name"]
    one, two = (parse_args(["--demo", *words, *DEMO_VARIANTS[:number]]) for number in (1, 2))
    assert one.for_model(DEMO_VARIANTS[0]) == one
    own = two.for_model(DEMO_VARIANTS[1])
    assert own.model.name == DEMO_VARIANTS[1] and own.output.save_predictions is None
    assert (own.output.output_dir, own.output.export) == (Path("o", DEMO_VARIANTS[1]), Path("e", DEMO_VARIANTS[1]))


def test_the_dataset_path_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("CITYSCAPES_DATASET", "/data")
    assert parse_args([]).data.dataset_path == Path("/data")
    assert parse_args(["--dataset-path", "/other"]).data.dataset_path == Path("/other")


def test_every_field_of_the_config_has_one_option():
    targets = [option.target for group in OPTIONS.values() for option in group]
    sections = {name: section for name, section in vars(Config()).items() if dataclasses.is_dataclass(section)}
    fields = [f"{name}.{field.name}" for name, section in sections.items() for field in dataclasses.fields(section)]
    assert sorted([*targets, "runtime.device"]) == sorted([*fields, "use_cuda", "list_models"])


def test_option_values_can_be_written_as_json_and_the_command_be_repeated_in_a_shell():
    words = ["--demo", "--cache-dir", "/tmp/x y", "--default-param-bw", "4", "--model-name", *DEMO_VARIANTS]
    config = parse_args(words)
    values = option_values(config)
    assert (values["cache_dir"], values["default_param_bw"], values["batch_size"]) == ("/tmp/x y", 4, 8)
    assert values["model_name"] == " ".join(DEMO_VARIANTS)
    assert "--cache-dir '/tmp/x y' " in config.command


def test_the_chip_is_a_part_name_and_sm8750_if_none_is_named():
    for options, chips, images in (
        ("--demo", (), 50),
        ("--demo --npu", ("sm8750",), 50),
        ("--demo --npu Snapdragon-8-Gen-3 --npu-images all", ("sm8650",), "all"),
        ("--demo --npu qcs6490 SM7325 galaxy-s25 --npu-images 3", ("qcs6490", "sm8750"), 3),
        ("--demo --npu all", tuple(CHIPS), 50),
    ):
        npu = parse_args(options.split()).npu
        assert (npu.chips, npu.images) == (chips, images)


def test_ai_hubs_networks_get_the_input_sizes_that_ai_hub_published():
    config = parse_args(["--dataset-path", "c", "--model-name", "ai-hub"])
    assert sorted(config.model.names) == sorted(ZOO)
    for name in ZOO:
        assert config.for_model(name).data.input_size == ai_hub_result(name).input_size
    named = parse_args(["--dataset-path", "c", "--model-name", *ZOO])
    assert named.for_model(ZOO[-1]).data.input_size is None
    given = parse_args(["--dataset-path", "c", "--model-name", "ai-hub", "--input-size", "256x512"])
    assert given.for_model(ZOO[-1]).data.input_size == (256, 512)


@pytest.mark.parametrize(
    ("option", "expected"),
    (
        ("--help", "--dataset-path"),
        ("--version", f"ffnet_quanteval.py {ffnet.__version__}\n"),
        ("--npu list", "Snapdragon 8 Elite "),
    ),
)
def test_help_version_and_the_list_of_chips_do_not_import_torch(option, expected):
    script = f"import sys, ffnet_quanteval\ntry: ffnet_quanteval.main({option.split()})\nexcept SystemExit: pass\n"
    script += "assert 'torch' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", script], cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    assert expected in ran.stdout
