"""Make the table of what Qualcomm AI Hub published for FFNets anew, from a wheel of its package.

    pip download --no-deps qai-hub-models
    python -m ffnet.results.ai_hub qai_hub_models-*.whl

This replaces `ai_hub.json`, which `ffnet.results.published` reads, and the tables in `docs/published.md`. The values
are those in `numerics.yaml` and `perf.yaml` of each model.
"""

import json
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # PyYAML, which aimet-torch needs too

from ffnet.results.published import RUNTIMES
from ffnet.system.files import write_atomically
from ffnet.system.text import format_number
from ffnet.variants import AI_HUB_INPUT_SIZES

TABLE_FILE = Path(__file__).with_name("ai_hub.json")
PAGE = Path(__file__).parents[2] / "docs" / "published.md"
MARKERS = ("<!-- Written by ffnet/results/ai_hub.py -->", "<!-- End of what it wrote -->")
FOLDERS = ("ffnet_40s", "ffnet_54s", "ffnet_78s", "ffnet_78s_lowres", "ffnet_122ns_lowres")
MODELS = dict(zip(FOLDERS, AI_HUB_INPUT_SIZES, strict=True))  # folder in the wheel -> variant


def read_wheel(path: Path) -> dict[str, Any]:
    """Return the content of `ai_hub.json`; the first device is the one on which the mIoU was measured."""
    with zipfile.ZipFile(path) as wheel:

        def load(name: str) -> Any:
            return yaml.safe_load(wheel.read(f"qai_hub_models/{name}.yaml"))

        files = ("manifest", "numerics", "perf")
        models = {name: _model(*(load(f"models/{folder}/{file}") for file in files)) for folder, name in MODELS.items()}
        table = load("devices_and_chipsets")
    measured = {device for model in models.values() for device in model["latency_ms"]["w8a8"]}
    mentioned = {model.pop("miou_device") for model in models.values()}
    # A device with a reference repeats the latency of another one.
    order = sorted(
        measured, key=lambda name: (name not in mentioned, "reference_chipset" in table["devices"][name], name)
    )
    return {
        "source": f"Qualcomm AI Hub Models {path.name.split('-')[1]}",
        "devices": {name: _part(table["chipsets"][table["devices"][name]["chipset"]]) for name in order},
        "models": models,
    }


def _model(manifest: Mapping[str, Any], numerics: Mapping[str, Any], perf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a model; latencies in milliseconds are those by device and runtime."""
    (metric,) = numerics["metrics"]
    ((miou_device, mious),) = metric["device_metric"].items()
    width, height = manifest["technical_details"]["Input resolution"].split("x")
    latency = {}
    for precision, entry in perf["precisions"].items():
        (component,) = entry["components"].values()
        latency[precision] = {
            device: {key: runs[key]["inference_time_milliseconds"] for key in RUNTIMES if key in runs}
            for device, runs in component["performance_metrics"].items()
        }
    return {
        "name": manifest["name"],
        "input_size": [int(height), int(width)],
        "miou_device": miou_device,
        "miou_images": metric["num_partial_samples"],
        "float_miou": metric["partial_torch_metric"],
        "w8a8_miou": {key: mious["w8a8"][key]["partial_metric"] for key in RUNTIMES},
        "latency_ms": latency,
    }


def _part(chipset: Mapping[str, Any]) -> str:
    """Return the part name of a chip, such as "sm8750" of "sm8750-ac"; AI Hub lists it among the aliases."""
    parts = (re.search(r"\b(s[acmdx]+|qc[ms])\d{4}[a-z]*\b", alias) for alias in reversed(chipset["aliases"]))
    return next(part[0] for part in parts if part)


def markdown_tables(table: Mapping[str, Any]) -> str:
    """Return the tables in `docs/published.md`: the mIoU of each model, and its W8A8 latency on each device."""
    models: Mapping[str, Mapping[str, Any]] = table["models"]
    runtimes = " / ".join(RUNTIMES.values())
    mious = []
    for name, model in models.items():
        miou, w8a8 = model["float_miou"], model["w8a8_miou"]
        change = _cell({key: value - miou for key, value in w8a8.items()}, "+")
        mious.append((model["name"], name, "{}x{}".format(*model["input_size"]), miou, _cell(w8a8), change))
    latency = [
        (f"{device} ({part})", *(_cell(model["latency_ms"]["w8a8"].get(device, {})) for model in models.values()))
        for device, part in table["devices"].items()
    ]
    return "\n\n".join(
        (
            f"{table['source']}: mIoU in percent and its change on a "
            f"{next(iter(table['devices']))}, W8A8 by {runtimes}:",
            _markdown([("AI Hub", "model", "input", "float", "W8A8", "change"), *mious]),
            f'W8A8 latency in milliseconds by {runtimes}; "-" if none was published:',
            _markdown([("device", *(model["name"] for model in models.values())), *latency]),
        )
    )


def _cell(values: Mapping[str, float], sign: str = "") -> str:
    return " / ".join(format_number(values.get(key), 1, sign) for key in RUNTIMES)


def _markdown(rows: list[tuple[Any, ...]]) -> str:
    heading, *body = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join((heading, "| --- " * len(rows[0]) + "|", *body))


def main(wheel: Path) -> None:
    """Write the table and the page from a wheel of qai-hub-models."""
    table = read_wheel(wheel)
    write_atomically(TABLE_FILE, json.dumps(table, indent=1) + "\n")
    before, rest = PAGE.read_text("utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    write_atomically(PAGE, f"{before}{MARKERS[0]}\n\n{markdown_tables(table)}\n\n{MARKERS[1]}{after}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
