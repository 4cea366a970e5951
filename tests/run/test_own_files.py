"""The program's own files after somebody edited them: refused by name, dropped with a message, or harmless."""

import copy
import json
import math
import random
import zlib
from types import SimpleNamespace

import pytest
import safetensors
import safetensors.torch
import torch

from ffnet.config import PROGRESS_FOLDER
from ffnet.evaluation.scores import Shard
from ffnet.quantization.quantize import FoundEncodings
from ffnet.quantization.recovery.search import Measurement
from ffnet.quantization.sites import read_state
from ffnet.report.rendering import format_console
from ffnet.run.pipeline import finished_result
from ffnet.run.records import RecordFile, read_records
from ffnet.run.session import Saved
from ffnet.run.storage import IMAGES, NPU, Storage
from ffnet.system.errors import UserError
from tests.helpers.results import PAIR, small_npu, small_recovery, small_result, small_scores
from tests.run.test_records import RECORDED, random_scores

TIMES = 150
ODD = (
    None,
    True,
    -1,
    1.5,
    2**62,
    2**70,
    10**400,
    -(2**63),
    math.nan,
    math.inf,
    "x",
    "",
    [],
    {},
    [[]],
    {"a": 1},
    [None],
)


def mutated(value, rng):
    """Return a JSON value in which one thing is replaced, removed, added, or nested more deeply."""
    value = copy.deepcopy(value)
    holders = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    for holder, key in holders:  # grows
        child = holder[key]
        if isinstance(child, dict | list) and child:
            own = [(child, each) for each in (child if isinstance(child, dict) else range(len(child)))]
            holders.extend(rng.sample(own, min(len(own), 8)))
    holder, key = rng.choice(holders)
    kind = rng.choice(("replace", "replace", "remove", "add", "nest"))
    if kind == "replace":
        holder[key] = rng.choice(ODD)
    elif kind == "remove":
        del holder[key]
    elif kind == "nest":
        holder[key] = [holder[key]]
    elif isinstance(holder, dict):
        holder["other"] = rng.choice(ODD)
    else:
        holder.append(rng.choice(ODD))
    return value


def mutated_bytes(data, rng):
    """Return data that is cut off, or in which some bytes are others."""
    if rng.random() < 0.5:
        return data[: rng.randrange(len(data))]
    position = rng.randrange(len(data))
    return data[:position] + rng.randbytes(3) + data[position + 3 :]


def test_no_edited_record_is_used(tmp_path):
    path, rng = tmp_path / "images-0.jsonl", random.Random(0)
    file = RecordFile(path)
    file.append([3], random_scores(1))
    file.close()
    original = path.read_bytes()
    content = json.loads(original[9:])
    one_more = copy.deepcopy(content)
    one_more["confusion"]["FP32"][0] += 1  # the backends count different labels
    for changed in (one_more, *(mutated(content, rng) for _ in range(4 * TIMES))):
        line = json.dumps(changed).encode()
        path.write_bytes(b"%08x %s\n" % (zlib.crc32(line), line))
        shard, dropped = read_records([path], RECORDED)
        times = {**changed, "seconds": 0, "scoring_seconds": 0} == {**content, "seconds": 0, "scoring_seconds": 0}
        assert (shard is None) == (dropped == {path: 1}) and (shard is None or times), changed


def test_records_that_contradict_each_other_about_the_labels_are_dropped_from_both_files(tmp_path):
    paths = [tmp_path / f"images-{rank}.jsonl" for rank in range(2)]
    for path, images, seed in zip(paths, ([3, 4], [3, 5]), (0, 1), strict=True):
        file = RecordFile(path)
        scores = random_scores(2, seed)
        for matrices in scores.confusion_matrices.values():
            matrices[0, 0, 0] += seed
        file.append(images, scores)
        file.close()
    shard, dropped = read_records(paths, RECORDED)
    assert shard.indices.tolist() == [4, 5] and dropped == dict.fromkeys(paths, 1)
    assert read_records(paths, RECORDED)[1] == {}


def test_edited_settings_are_refused(tmp_path):
    rng, now, storage = random.Random(0), {"--seed": 0, "device": "CPU"}, Storage(tmp_path)
    storage.begin(now, False, {})
    for _ in range(TIMES):
        changed = mutated([now], rng)[:1] or [None]
        if changed in ([now], [{**now, "other": None}]):
            continue
        (tmp_path / PROGRESS_FOLDER / "settings.json").write_text(json.dumps(changed[0]))
        with pytest.raises(UserError, match="settings.json: this file is damaged|made under other conditions"):
            storage.begin(now, True, {})
    storage.close()


def saved_files(storage, state):
    """Save a network and two parts of a recovery; return {path: function that reads it}."""
    storage.save_network(FoundEncodings(state, 4, 2, small_recovery()))
    scores = random_scores(2).confusion_matrices[PAIR[0]].tolist()
    storage.save("candidate-0", {}, {"matrices": scores, "seconds": 1.0, "taken": 2.0})
    storage.save("ranges", state, 8)
    return {
        "network.safetensors": lambda: storage.load_network(state),
        "recovery-candidate-0.safetensors": lambda: storage.load("candidate-0", {}, Measurement),
        "recovery-ranges.safetensors": lambda: storage.load("ranges", state, int),
    }


def edited_tensors(path, rng):
    """Return the content of a safetensors file with something edited in it: still a valid file."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if tensors and rng.random() < 0.5:
        name = rng.choice(sorted(tensors))
        change = rng.choice((torch.double, "drop", "flat", math.nan, math.inf))
        if change == "drop":
            del tensors[name]
        elif change == "flat":
            tensors[name] = torch.cat([tensors[name].flatten(), torch.zeros(1)])
        elif change == torch.double:
            tensors[name] = tensors[name].double()
        else:
            tensors[name] = torch.full_like(tensors[name], change)
    else:
        key = rng.choice(sorted(metadata))
        metadata[key] = (
            json.dumps(mutated([json.loads(metadata[key])], rng)[:1] or None).removeprefix("[").removesuffix("]")
        )
    return safetensors.torch.save(tensors, metadata)


def test_edited_networks_and_parts_of_a_recovery_are_refused_by_name(tmp_path, toy_sim):
    storage, rng, state = Storage(tmp_path), random.Random(0), read_state(toy_sim)
    storage.begin({}, False, {})
    small = dict(list(state.items())[:3])
    refused = 0
    for name, read in saved_files(storage, small).items():
        path = tmp_path / PROGRESS_FOLDER / name
        original = path.read_bytes()
        for number in range(TIMES):
            path.write_bytes(original)
            path.write_bytes(edited_tensors(path, rng) if number % 3 else mutated_bytes(original, rng))
            try:
                found = read()
                assert name != "network.safetensors" or found.recovery.describe()
            except UserError as error:
                refused += 1
                assert str(path) in str(error) and "this file is damaged" in str(error)
    storage.close()
    assert refused > 1.5 * TIMES


def test_an_edited_result_is_refused_by_name_or_its_metrics_are_those_of_the_records(tmp_path):
    scores = small_scores()
    npu = small_npu()
    expected = small_result(scores, recovery=small_recovery(), npu=npu)
    content, rng, path = json.loads(json.dumps(expected.to_json())), random.Random(0), tmp_path / "result.json"
    matrices = scores.confusion_matrices
    of_npu = small_scores(
        confusion_matrices=dict(zip(npu.backends, matrices.values(), strict=True)),
        seconds=dict.fromkeys(npu.backends, 1.0),
        agreeing_pixels={tuple(npu.backends): scores.agreeing_pixels[PAIR]},
    )
    shards = {IMAGES: Shard([0, 1], scores), NPU: Shard([0, 1], of_npu)}
    run = SimpleNamespace(saved_work=Saved(shards))
    images = SimpleNamespace(names=expected.details.image_names, size=expected.details.image_size)
    refused = 0
    for number in range(4 * TIMES):
        text = json.dumps(content)
        path.write_text(json.dumps(mutated(content, rng)) if number else text)
        try:
            found = finished_result(tmp_path, run, images)
            assert found.backends.keys() == expected.backends.keys() and found.agreement == expected.agreement
            assert found.backends["FP32"].confusion_matrix == expected.backends["FP32"].confusion_matrix
            format_console(found)
        except UserError as error:
            refused += 1
            assert number and str(path) in str(error) and "this file is damaged" in str(error)
    assert refused > 2 * TIMES
