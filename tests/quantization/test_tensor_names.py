"""Names in encodings files against the quantizer sites that they describe."""

import re

import pytest

from ffnet.quantization.sites import quantizer_sites
from ffnet.quantization.tensor_names import match_encodings
from ffnet.system.errors import UserError

NEWEST = "tensors_2.0.0.encodings"
pytestmark = pytest.mark.filterwarnings("ignore")  # of AIMET and torch, whose older exporters make the files


def match(case, content):
    return match_encodings(case.sim, quantizer_sites(case.sim), case.read(content))


@pytest.mark.parametrize("names", (("t.1", "449"), ("x", "output"), ("picture", "logits"), ("image", "scores")))
def test_input_and_output_are_matched_under_any_name(small_case, names):
    content = small_case.content(NEWEST)
    expected, unexpected = match(small_case, content)
    for entry in content["encodings"]:
        entry["name"] = {"image": names[0], "logits": names[1]}.get(entry["name"], entry["name"])
    found, others = match(small_case, content)
    by_name, expected_by_name = (
        {site.name: encoding for site, encoding in sites.items()} for sites in (found, expected)
    )
    assert by_name == expected_by_name and unexpected == others == []


def test_a_name_of_no_layer_is_unexpected(small_case):
    content = small_case.content(NEWEST)
    content["encodings"].append(content["encodings"][0] | {"name": "/nobody/Relu_output_0"})
    assert match(small_case, content)[1] == ["/nobody/Relu_output_0"]


def use_numbers(content):
    for i, entry in enumerate(content["encodings"]):
        if not entry["name"].endswith(("weight", "bias")):
            entry["name"] = str(200 + i)


def contradict(content):
    content["encodings"].append(content["encodings"][0] | {"name": "input", "y_scale": 1.0})


@pytest.mark.parametrize(
    "change, message",
    ((use_numbers, "ends in _torch.encodings"), (contradict, "'input' contradicts another one for the same tensor")),
)
def test_names_that_can_not_be_matched_are_errors(small_case, change, message):
    content = small_case.content(NEWEST)
    change(content)
    path = re.escape(str(small_case.folder / "written.json"))
    with pytest.raises(UserError, match=f"--encodings {path}: .*{message}"):
        match(small_case, content)
