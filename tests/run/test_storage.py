"""The saved work of a run: what must be the same to continue with it, and who may."""

import dataclasses
import errno
import os
from pathlib import Path

import pytest
import torch

from ffnet.config import (
    PROGRESS_FOLDER,
    Config,
    DataConfig,
    ModelConfig,
    NpuConfig,
    OutputConfig,
    QuantizationConfig,
    Runtime,
)
from ffnet.options import FLAGS
from ffnet.quantization.quantize import FoundEncodings
from ffnet.quantization.quantsim import build_quantsim, equalize
from ffnet.quantization.sites import read_state, write_state
from ffnet.run.records import RecordFile
from ffnet.run.storage import IMAGES, MAY_DIFFER, NPU_IMAGES, Storage, conditions, differences
from ffnet.system.errors import UserError
from ffnet.system.files import unfinished_name
from tests.helpers.networks import random_batches, toy_model
from tests.helpers.results import small_recovery
from tests.helpers.simulations import encodings, logits
from tests.run.test_records import RECORDED, random_scores

NPU_KIND = NPU_IMAGES.format("sm8750")
NOW = {"--seed": 0, "device": "CPU"}


def conditions_of(config=None, weights="w", images="i"):
    return conditions(config or Config(), weights, images, "cpu")


@pytest.fixture
def opened():
    """The storages of a test, which are closed at its end."""
    storages = []
    yield storages
    for storage in storages:
        storage.close()


@pytest.fixture
def begin(opened, tmp_path):
    """Begins a run in `tmp_path`; returns its storage and the saved scores."""

    def begin(now=NOW, resume=False):
        storage = Storage(tmp_path)
        opened.append(storage)
        return storage, storage.begin(now, resume, dict.fromkeys((IMAGES, NPU_KIND), RECORDED))

    return begin


def save_images(folder, kind, rank, indices):
    records = RecordFile(folder / PROGRESS_FOLDER / f"{kind}-{rank}.jsonl")
    for index in indices:
        records.append([index], random_scores(1, seed=index))
    records.close()


@pytest.mark.parametrize(
    ("changed", "phrase"),
    (
        ({"quantization": QuantizationConfig(param_bw=4)}, "--default-param-bw was 8 and is 4"),
        ({"quantization": QuantizationConfig(max_drop=0.5)}, "--max-drop was None and is 0.5"),
        ({"data": DataConfig(limit=7)}, "--limit was None and is 7"),
        ({"runtime": Runtime(batch_size=3)}, "--batch-size was 8 and is 3"),
        ({"output": OutputConfig(execute=True)}, "--execute was False and is True"),
        ({"output": OutputConfig(save_predictions=Path("p"))}, "--save-predictions was None and is p"),
        ({"npu": NpuConfig(images="all")}, "--npu-images was 50 and is all"),
    ),
)
def test_an_option_that_changes_results_is_named(changed, phrase):
    assert differences(conditions_of(), conditions_of(dataclasses.replace(Config(), **changed))) == [phrase]


def test_options_that_change_no_result_may_differ():
    changed = Config(
        ModelConfig(checkpoint=Path("a.pth"), cache_dir=Path("c")),
        DataConfig(dataset_path=Path("moved")),
        runtime=Runtime(num_workers=3, quiet=True),
        output=OutputConfig(output_dir=Path("o"), resume=True, force=True, fail_under=1.0),
    )
    assert differences(conditions_of(), conditions_of(changed)) == []
    assert set(MAY_DIFFER) <= set(FLAGS)


def test_weights_images_files_and_versions_are_compared_but_not_the_code(tmp_path, monkeypatch):
    before = conditions_of()
    others = {name for name in before if not name.startswith(("--", "version of "))}
    assert others == {"sha256 of the weights", "sha256 of the images and labels", "device", "schema of result.json"}
    older = {name: value for name, value in before.items() if name != "schema of result.json"}
    assert differences(older, before) == ["schema of result.json was None and is 4"]
    assert differences(before, conditions_of(weights="other")) == ["the sha256 of the weights"]
    assert differences(before, conditions_of(images="other")) == ["the sha256 of the images and labels"]
    monkeypatch.setattr("ffnet.run.storage.__version__", "0.1")
    (phrase,) = differences(before, conditions_of())
    assert phrase.startswith("version of this program was ") and phrase.endswith(" and is 0.1")
    path = tmp_path / "a.encodings"
    path.write_text("1")
    config = Config(quantization=QuantizationConfig(encodings=path))
    before = conditions_of(config)
    path.write_text("2")
    assert differences(before, conditions_of(config)) == ["the sha256 of --encodings"]


def test_a_run_continues_with_the_images_of_all_ranks_of_an_earlier_one(begin, tmp_path, caplog):
    begin()[0].close()
    save_images(tmp_path, IMAGES, 0, [0, 2])
    save_images(tmp_path, IMAGES, 1, [5, 1])
    save_images(tmp_path, NPU_KIND, 0, [5, 0])
    path = tmp_path / PROGRESS_FOLDER / "images-1.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"image":1', b'{"image":7'))  # its checksum is wrong
    storage, scores = begin(resume=True)
    assert {kind: shard.indices.tolist() for kind, shard in scores.items()} == {IMAGES: [0, 2, 5], NPU_KIND: [0, 5]}
    assert f"{path}: dropped 1 record, torn when the earlier run stopped or damaged since; its image" in caplog.text
    for position, index in enumerate((0, 2, 5)):
        expected = random_scores(1, seed=index).confusion_matrices["FP32"][0]
        assert (scores[IMAGES].scores.confusion_matrices["FP32"][position] == expected).all()
    assert not storage.is_finished and not storage.has_network


def test_other_conditions_are_refused_by_name_and_nothing_is_lost_until_a_run_starts_again(begin, opened, tmp_path):
    begin()[0].close()
    save_images(tmp_path, IMAGES, 0, [0])
    for now, phrase in (({**NOW, "--seed": 1}, "--seed was 0 and is 1"), ({"--seed": 0}, "device was CPU and is None")):
        with pytest.raises(UserError, match=f"--resume: .*: {phrase}"):
            begin(now, resume=True)
        opened[-1].close()
    storage, scores = begin(resume=True)
    assert scores[IMAGES].indices.tolist() == [0]
    storage.close()
    begin({"--seed": 1})[0].close()
    assert begin({"--seed": 1}, resume=True)[1] == {}


def test_a_folder_serves_one_run_at_a_time(begin):
    first, _ = begin()
    for resume in (False, True):
        with pytest.raises(UserError, match="another run writes there"):
            begin(resume=resume)
    first.close()
    begin()


@pytest.mark.parametrize("content", ("", "[]", "\0", "{", "[" * 10**5))
def test_damaged_settings_are_an_error_that_names_the_file(begin, tmp_path, content):
    begin()[0].close()
    (tmp_path / PROGRESS_FOLDER / "settings.json").write_text(content)
    with pytest.raises(UserError, match="settings.json: this file is damaged .* --force"):
        begin(resume=True)


def test_a_run_is_finished_as_long_as_its_results_are_there(begin, tmp_path):
    storage, _ = begin()
    for name in ("report.html", "per_image.csv", "result.json"):  # result.json is written last
        storage.mark_finished()
        assert not storage.is_finished
        (tmp_path / name).touch()
    storage.mark_finished()
    assert storage.is_finished
    for damage in (b"", b"\xff"):
        (tmp_path / PROGRESS_FOLDER / "finished").write_bytes(damage)
        assert not storage.is_finished
    storage.mark_finished()
    (tmp_path / "report.html").unlink()
    assert not storage.is_finished


def test_a_new_run_removes_no_files_of_others(begin, tmp_path):
    """With --force, somebody else may have made the folder `progress`."""
    folder = tmp_path / PROGRESS_FOLDER
    (folder / "pictures").mkdir(parents=True)
    others = [folder / name for name in ("thesis.txt", "images-a.jsonl", "network.safetensors.bak", "pictures/a.png")]
    unfinished = folder / unfinished_name("settings.json"), tmp_path / unfinished_name("report.html")
    for path in (*others, *unfinished, folder / "images-12.jsonl"):
        path.write_text("x")
    begin()
    expected = {*others, folder / "settings.json", folder / "lock"}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == expected


@pytest.mark.parametrize("make", (Path.touch, lambda path: path.symlink_to("nowhere/else")))
def test_a_folder_in_which_nothing_can_be_saved_is_named(begin, tmp_path, make):
    make(tmp_path / PROGRESS_FOLDER)
    with pytest.raises(UserError, match=f"--output-dir {tmp_path}: .*{PROGRESS_FOLDER} .* another folder"):
        begin()


def test_a_disk_on_which_no_lock_can_be_taken_is_named(begin, monkeypatch):
    def acquire(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("ffnet.run.storage.FileLock.acquire", acquire)
    with pytest.raises(UserError, match=f"--output-dir .*{os.strerror(errno.ENOLCK)}.* another folder"):
        begin()


def test_a_rank_on_a_node_without_the_folder_saves_its_records_there(tmp_path):
    with Storage(tmp_path / "other node").open_records(IMAGES, 3) as records:
        records.append([4], random_scores(1))
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == ["images-3.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("rounded", (False, True))
def test_a_saved_network_is_restored_to_the_last_bit(begin, toy_sim, rounded):
    """Into an uncalibrated simulation with other weights, which are replaced only if those saved may be rounded."""
    recovery = small_recovery() if rounded else None
    storage, _ = begin()
    saved = FoundEncodings(read_state(toy_sim), 4, 2, recovery)
    storage.save_network(saved)
    found = Storage(storage.output_dir).load_network(read_state(toy_sim))
    assert dataclasses.replace(found, state={}) == dataclasses.replace(saved, state={})
    other = build_quantsim(equalize(toy_model()), QuantizationConfig(param_bw=4))
    x = random_batches()[0]
    for parameter in other.model.parameters() if rounded else ():
        parameter.data.add_(0 if parameter.dim() == 1 else 1)  # not biases
    write_state(other, found.state)
    assert encodings(other) == encodings(toy_sim) and torch.equal(logits(other.model, x), logits(toy_sim.model, x))


def test_a_pipe_among_the_saved_work_is_refused_by_name(begin, opened, tmp_path):
    storage, folder = begin()[0], tmp_path / PROGRESS_FOLDER
    uses = {
        "network.safetensors": lambda: storage.load_network({}),
        "npu-sm8750-0.jsonl": lambda: storage.open_records(NPU_KIND, 0).__enter__(),
        "images-1.jsonl": lambda: begin(resume=True),
        "settings.json": lambda: begin(resume=True),
    }
    for name, use in uses.items():
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        opened[-1].close()
        with pytest.raises(UserError, match=rf"{name}.*\(.*it is a pipe, not a file"):
            use()
