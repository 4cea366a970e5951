"""The program's own files after somebody edited them: refused by name, dropped with a message, or harmless."""

import copy
import json
import math
import random
import zlib
from types import SimpleNamespace

import safetensors
import safetensors.torch

from ffnet.evaluation.scores import FP32, NPU, Shard
from ffnet.labels import CITYSCAPES
from ffnet.quantization.quantize import FoundEncodings
from ffnet.quantization.recovery.search import Measurement
from ffnet.quantization.sites import read_state
from ffnet.report.rendering import format_console
from ffnet.run.pipeline import finished_result
from ffnet.run.records import RecordFile, read_records
from ffnet.run.session import Saved
from ffnet.run.storage import IMAGES, NPU_IMAGES, Storage
from ffnet.system.errors import UserError
from tests.helpers.mutations import changed, random_changes
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


def children(value):
    """Return (holder, key) of everything directly in a JSON value, of a long list only of some."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys[:8]]


def mutated(value, rng):
    """Return a JSON value in which one thing is replaced, removed, added, or nested more deeply."""
    value = copy.deepcopy(value)
    places = children(value)
    for holder, key in places:  # grows
        places.extend(children(holder[key]))
    holder, key = rng.choice(places)
    kind = rng.choice(("replace", "replace", "remove", "add", "nest"))
    if kind == "remove":
        del holder[key]
    elif kind == "add" and isinstance(holder, list):
        holder.append(rng.choice(ODD))
    else:
        holder["other" if kind == "add" else key] = [holder[key]] if kind == "nest" else rng.choice(ODD)
    return value


def test_no_edited_record_is_used(tmp_path):
    path, rng = tmp_path / "images-0.jsonl", random.Random(0)
    file = RecordFile(path)
    file.append([3], random_scores(1))
    file.close()
    original = path.read_bytes()
    content = json.loads(original[9:])
    one_more = copy.deepcopy(content)
    one_more["confusion"]["FP32"][0] += 1  # the backends count different labels
    for edited in (one_more, *(mutated(content, rng) for _ in range(4 * TIMES))):
        line = json.dumps(edited).encode()
        path.write_bytes(b"%08x %s\n" % (zlib.crc32(line), line))
        shard, dropped = read_records([path], RECORDED)
        times = dict.fromkeys(("seconds", "scoring_seconds", "processor_seconds"), 0)
        same = {**edited, **times} == {**content, **times}
        assert (shard is None) == (dropped == {path: 1}) and (shard is None or same), edited


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


def edited_tensors(path, rng):
    """Return the content of a safetensors file with something edited in it: still a valid file."""
    with safetensors.safe_open(path, "pt") as file:
        description, tensors = file.metadata()["description"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if tensors and rng.random() < 0.5:
        name, tensor = rng.choice(sorted(tensors.items()))
        changed = (
            tensor.double(),
            tensor.flatten().repeat(2),
            tensor.new_full(tensor.shape, -9),
            tensor * math.inf,
            None,
        )
        tensors[name] = rng.choice(changed)
    else:
        description = json.dumps(mutated([json.loads(description)], rng))[1:-1]
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return safetensors.torch.save(present, {"description": description})


def test_edited_networks_and_parts_of_a_recovery_are_refused_by_name(tmp_path, toy_sim):
    storage, rng, state = Storage(tmp_path), random.Random(0), dict(list(read_state(toy_sim).items())[:3])
    storage.begin({}, False, {})
    storage.save_network(FoundEncodings(state, 4, 2, small_recovery()))
    scores = random_scores(2).confusion_matrices[PAIR[0]].tolist()
    storage.save("candidate-0", {}, {"matrices": scores, "seconds": 1.0, "taken": 2.0})
    storage.save("ranges", state, 8)
    readers = {
        "network": lambda: storage.load_network(state).recovery.describe(),
        "recovery-candidate-0": lambda: storage.load("candidate-0", {}, Measurement),
        "recovery-ranges": lambda: storage.load("ranges", state, int),
    }
    refused = 0
    for name, read in readers.items():
        path = storage.folder / f"{name}.safetensors"
        original = path.read_bytes()
        for number in range(TIMES):
            path.write_bytes(original)
            path.write_bytes(edited_tensors(path, rng) if number % 3 else changed(original, random_changes(rng)))
            try:
                read()
            except UserError as error:
                refused += 1
                assert str(path) in str(error) and "this file is damaged" in str(error) and "Delete it" in str(error)
    storage.close()
    assert refused > 1.5 * TIMES


def test_an_edited_result_is_refused_by_name_or_its_metrics_are_those_of_the_records(tmp_path):
    scores = small_scores()
    npu = small_npu()
    expected = small_result(scores, recovery=small_recovery(), npu=npu)
    content, rng, path = json.loads(json.dumps(expected.to_json())), random.Random(0), tmp_path / "result.json"
    matrices = scores.confusion_matrices
    of_npu = small_scores(
        confusion_matrices=dict(zip((FP32, NPU), matrices.values(), strict=True)),
        seconds=dict.fromkeys((FP32, NPU), 1.0),
        agreeing_pixels={(FP32, NPU): scores.agreeing_pixels[PAIR]},
    )
    shards = {IMAGES: Shard([0, 1], scores), NPU_IMAGES.format("sm8750"): Shard([0, 1], of_npu)}
    run = SimpleNamespace(saved_work=Saved(shards))
    images = SimpleNamespace(names=expected.details.image_names, size=expected.details.image_size, label_set=CITYSCAPES)
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
