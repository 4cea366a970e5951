"""AI Hub's published results: the table of the code and those of the documentation agree."""

import subprocess
import sys
from pathlib import Path

import pytest

from ffnet.chips import CHIPS
from ffnet.results.ai_hub import (
    DEVICES,
    MIOU_IMAGES,
    RESULTS,
    SOURCE,
    ByRuntime,
    PublishedLatency,
    galaxy_s25,
    published_latency,
)
from ffnet.variants import VARIANTS

PAGE = (Path(__file__).parents[2] / "docs" / "published.md").read_text()


def table(heading):
    """Return the rows of the page's Markdown table with the heading, as a dictionary of cells for each model."""
    lines = PAGE.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(heading)]
    columns = cells(lines[start])
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *values = cells(line)
        rows[name] = dict(zip(columns[1:], values, strict=True))
    return rows


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def by_runtime(cell):
    return ByRuntime(*(None if value == "-" else float(value) for value in cell.split(" / ")))


def test_every_model_is_a_variant_and_every_device_has_a_known_chip():
    assert RESULTS.keys() <= VARIANTS.keys()
    assert DEVICES.keys() <= CHIPS.keys()
    for name, results in RESULTS.items():
        assert results.latency.keys() == DEVICES.keys()
        assert (results.input_size == (512, 1024)) == VARIANTS[name].pre_down


def test_the_documentation_has_the_results_of_the_galaxy_s25():
    rows = table("| model | float |")
    assert rows.keys() == RESULTS.keys()
    for name, row in rows.items():
        published = galaxy_s25(name)
        assert float(row["float"]) == published.float_miou
        assert by_runtime(row["W8A8, by TFLite / DLC / ONNX"]) == published.w8a8_miou
        assert by_runtime(row["W8A8 latency, by TFLite / DLC / ONNX"]) == published.latency


def test_the_documentation_has_the_latency_of_every_device():
    rows = table("| model | input |")
    assert rows.keys() == RESULTS.keys()
    for name, row in rows.items():
        assert row.pop("input") == "x".join(map(str, RESULTS[name].input_size))
        assert {device: by_runtime(cell) for device, cell in row.items()} == {
            device: RESULTS[name].latency[part] for part, device in DEVICES.items()
        }


def test_the_documentation_names_source_and_number_of_images():
    text = " ".join(PAGE.split())
    assert SOURCE.replace(", ", "'s ") in text and f"on {MIOU_IMAGES} images" in text


def test_values_on_the_galaxy_s25_are_the_published_ones():
    result = galaxy_s25("segmentation_ffnet40S_dBBB_mobile")
    assert (result.device, result.float_miou) == ("Snapdragon 8 Elite (Galaxy S25)", 76.8)
    assert (result.w8a8_miou, result.latency) == (ByRuntime(76.6, 76.4, 76.5), ByRuntime(4.0, 7.2, 6.8))


def test_a_variant_without_published_results_has_none():
    assert galaxy_s25("segmentation_ffnet150_AAA") is None


@pytest.mark.parametrize(
    ("chip", "device", "milliseconds", "fastest"),
    (
        ("sm8750", "Snapdragon 8 Elite (Galaxy S25)", ByRuntime(4.0, 7.2, 6.8), 4.0),
        ("sm8850", "Snapdragon 8 Elite Gen 5", ByRuntime(2.9, 5.2, 3.8), 2.9),
        ("sc8380xp", "Snapdragon X Elite", ByRuntime(None, 16.0, 10.3), 10.3),
        ("sa8775p", "Snapdragon 8 Elite (Galaxy S25)", ByRuntime(4.0, 7.2, 6.8), 4.0),
        (None, "Snapdragon 8 Elite (Galaxy S25)", ByRuntime(4.0, 7.2, 6.8), 4.0),
    ),
)
def test_the_latency_is_that_on_a_measured_chip_or_on_the_galaxy_s25(chip, device, milliseconds, fastest):
    latency = published_latency("segmentation_ffnet40S_dBBB_mobile", chip)
    assert (latency.device, latency.input_size, latency.milliseconds) == (device, (1024, 2048), milliseconds)
    assert latency.fastest == fastest
    assert published_latency("segmentation_ffnet150_AAA", chip) is None


def test_no_runtime_is_the_fastest_if_none_was_published():
    assert PublishedLatency("device", (1, 1), ByRuntime(None, None, None)).fastest is None


def test_the_results_need_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, ffnet.results.ai_hub; assert 'torch' not in sys.modules"], check=True
    )
