"""The table of what Qualcomm AI Hub published is read from its package, and the documentation shows it."""

import json
import zipfile

import pytest
import yaml

from ffnet.results import ai_hub


@pytest.fixture
def wheel(tmp_path):
    """A wheel with the entries of the real one that are read; each model has one device more than the one before."""
    part = {"phone": ["qualcomm-snapdragon-8-elite-for-galaxy", "sm8750-ac"], "board": ["qualcomm-qcs8550-proxy"]}
    devices = {"Samsung": "phone", "A copy of Samsung": "phone", "Proxy": "board"}
    files = {
        "devices_and_chipsets": {
            "chipsets": {name: {"aliases": aliases} for name, aliases in part.items()},
            "devices": {name: {"chipset": chip} for name, chip in devices.items()},
        }
    }
    files["devices_and_chipsets"]["devices"]["A copy of Samsung"]["reference_chipset"] = "phone"
    for folder in ai_hub.MODELS:
        runs = {"tflite": {"inference_time_milliseconds": 1.26}, "onnx": {"inference_time_milliseconds": 2.0}}
        values = {key: {"partial_metric": 70.1} for key in ("tflite", "qnn_dlc", "onnx")}
        component = {"components": {"network": {"performance_metrics": dict.fromkeys(devices, runs)}}}
        files |= {
            f"models/{folder}/manifest": {"name": folder, "technical_details": {"Input resolution": "1024x512"}},
            f"models/{folder}/numerics": {
                "metrics": [
                    {
                        "device_metric": {"Samsung": {"float": values, "w8a8": values}},
                        "num_partial_samples": 50,
                        "partial_torch_metric": 71.0,
                    }
                ]
            },
            f"models/{folder}/perf": {"precisions": {"float": component, "w8a8": component}},
        }
    path = tmp_path / "qai_hub_models-9.8.7-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(f"qai_hub_models/{name}.yaml", yaml.safe_dump(content))
    return path


def test_the_table_is_read_from_a_wheel(wheel):
    table = ai_hub.read_wheel(wheel)
    assert table["source"] == "Qualcomm AI Hub Models 9.8.7"
    assert list(table["devices"].items()) == [
        ("Samsung", "sm8750"),
        ("Proxy", "qcs8550"),
        ("A copy of Samsung", "sm8750"),
    ]
    model = table["models"]["segmentation_ffnet78S_BCC_mobile"]
    assert (model["input_size"], model["miou_images"], model["float_miou"]) == ([512, 1024], 50, 71.0)
    assert model["latency_ms"]["w8a8"]["Proxy"] == {"tflite": 1.26, "onnx": 2.0}
    assert "| Proxy (qcs8550) | 1.3 / - / 2.0 |" in ai_hub.markdown_tables(table)


def test_the_tables_in_the_documentation_are_those_of_the_data_file():
    table = json.loads(ai_hub.TABLE_FILE.read_text("utf-8"))
    assert len(table["devices"]) == 21
    begin, end = ai_hub.MARKERS
    written = ai_hub.PAGE.read_text("utf-8").split(begin)[1].split(end)[0]
    assert written.strip() == ai_hub.markdown_tables(table)
