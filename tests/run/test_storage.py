"""The kept work of a run: what must be the same to go on with it, and who may."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.cityscapes import CityscapesSplit
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
from ffnet.options import OPTIONS
from ffnet.quantization.quantsim import build_quantsim, equalize
from ffnet.quantization.sites import read_state
from ffnet.results.result import Calibration
from ffnet.run.storage import (
    IMAGES,
    MAY_DIFFER,
    NPU,
    Progress,
    RecordFile,
    conditions,
    differences,
    images_digest,
    mark_finished,
    records_key,
)
from ffnet.system.errors import UserError
from tests.helpers.networks import random_batches, toy_model
from tests.helpers.results import small_recovery
from tests.helpers.simulations import encodings, logits
from tests.run.test_records import random_scores

CPU = torch.device("cpu")
NOW = {"--seed": 0, "device": "CPU"}


def conditions_of(config=None, weights="w", images="i"):
    return conditions(config or Config(), weights, images, CPU)


def begun(folder, now=NOW, resume=False):
    progress = Progress(folder)
    progress.begin(now, resume)
    return progress


def keep_images(folder, kind, rank, indices):
    records = RecordFile(folder / f"{kind}-{rank}.jsonl", records_key(NOW))
    for index in indices:
        records.append([index], random_scores(1, seed=index))
    records.close()


@pytest.mark.parametrize(
    ("changed", "phrase"),
    (
        ({"quantization": QuantizationConfig(param_bw=4)}, "--default-param-bw was 8 and is 4"),
        ({"quantization": QuantizationConfig(cle=False)}, "--cle was True and is False"),
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
        runtime=Runtime(num_workers=3, quiet=True, models_at_once=1),
        output=OutputConfig(output_dir=Path("o"), resume=True, force=True, fail_under=1.0),
    )
    assert differences(conditions_of(), conditions_of(changed)) == []
    assert set(MAY_DIFFER) <= {option.target for group in OPTIONS.values() for option in group}


def test_weights_images_files_and_versions_are_compared(tmp_path, monkeypatch):
    before = conditions_of()
    assert differences(before, conditions_of(weights="other")) == ["the sha256 of the weights"]
    assert differences(before, conditions_of(images="other")) == ["the sha256 of the images and labels"]
    monkeypatch.setattr("ffnet.run.storage.versions", lambda: {**before_versions(before), "torch": "1.0"})
    torch_version = before["version of torch"]
    assert differences(before, conditions_of()) == [f"version of torch was {torch_version} and is 1.0"]
    monkeypatch.undo()
    monkeypatch.setattr("ffnet.run.storage.code_digest", lambda: "changed")
    assert differences(before, conditions_of()) == ["the sha256 of this program's code"]
    monkeypatch.undo()
    path = tmp_path / "a.encodings"
    path.write_text("1")
    config = Config(quantization=QuantizationConfig(encodings=path))
    before = conditions_of(config)
    path.write_text("2")
    assert differences(before, conditions_of(config)) == ["the sha256 of --encodings"]


def before_versions(before):
    prefix = "version of "
    return {name.removeprefix(prefix): value for name, value in before.items() if name.startswith(prefix)}


def test_the_digest_of_images_depends_on_names_and_contents_but_not_on_the_folder(tree, tmp_path_factory):
    images = CityscapesSplit(tree, "val")
    digest = images_digest(images, 2)
    moved = tmp_path_factory.mktemp("x") / "moved"
    tree.rename(moved)
    assert images_digest(CityscapesSplit(moved, "val"), 0) == digest
    first, second = (Path(path) for path in CityscapesSplit(moved, "val").targets[:2])
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert images_digest(CityscapesSplit(moved, "val"), 2) != digest
    first.write_bytes(content)
    assert images_digest(CityscapesSplit(moved, "val"), 2) == digest
    assert images_digest(CityscapesSplit(moved, "val", 3), 2) != digest


def test_a_run_goes_on_with_the_images_of_all_ranks_of_an_earlier_one(tmp_path):
    begun(tmp_path / PROGRESS_FOLDER).close()
    keep_images(tmp_path / PROGRESS_FOLDER, IMAGES, 0, [0, 2])
    keep_images(tmp_path / PROGRESS_FOLDER, IMAGES, 1, [5])
    keep_images(tmp_path / PROGRESS_FOLDER, NPU, 0, [5, 0])
    progress = begun(tmp_path / PROGRESS_FOLDER, resume=True)
    assert progress.remaining(IMAGES, np.arange(6)).tolist() == [1, 3, 4]
    assert progress.remaining(NPU, np.array([0, 3, 5])).tolist() == [3]
    earlier = progress.earlier_scores(IMAGES)
    for position, index in enumerate((0, 2, 5)):
        expected = random_scores(1, seed=index).confusion_matrices["FP32"][0]
        assert np.array_equal(earlier.confusion_matrices["FP32"][position], expected)
    assert not progress.kept.finished and not progress.kept.network and progress.kept.compilation is None
    progress.close()


def test_other_conditions_are_refused_by_name_and_nothing_is_lost(tmp_path):
    begun(tmp_path / PROGRESS_FOLDER).close()
    keep_images(tmp_path / PROGRESS_FOLDER, IMAGES, 0, [0])
    for now, phrase in (({**NOW, "--seed": 1}, "--seed was 0 and is 1"), ({"--seed": 0}, "device was CPU and is None")):
        with pytest.raises(UserError, match=f"--resume: .*: {phrase}"):
            begun(tmp_path / PROGRESS_FOLDER, now, resume=True)
    assert begun(tmp_path / PROGRESS_FOLDER, resume=True).remaining(IMAGES, np.arange(2)).tolist() == [1]


def test_the_settings_of_another_version_are_called_different_and_not_damaged(tmp_path):
    begun(tmp_path).close()
    (tmp_path / "settings.json").write_text('{"conditions": {"version of torch": "1.0"}, "compilation": false}')
    with pytest.raises(UserError, match="made under other conditions: version of torch was 1.0"):
        begun(tmp_path, resume=True)


def test_without_resume_the_earlier_work_is_dropped(tmp_path):
    begun(tmp_path / PROGRESS_FOLDER).close()
    keep_images(tmp_path / PROGRESS_FOLDER, IMAGES, 3, [0])
    begun(tmp_path / PROGRESS_FOLDER, {"--seed": 1}).close()
    progress = begun(tmp_path / PROGRESS_FOLDER, {"--seed": 1}, resume=True)
    assert progress.remaining(IMAGES, np.arange(2)).tolist() == [0, 1]
    progress.close()


def test_a_folder_serves_one_run_at_a_time(tmp_path):
    first = begun(tmp_path)
    for resume in (False, True):
        with pytest.raises(UserError, match="another run writes there"):
            begun(tmp_path, resume=resume)
    first.close()
    begun(tmp_path).close()


@pytest.mark.parametrize("compilation", ("5", "[]", "[1]", '"ab"', '["yes", "no"]', "{}"))
def test_a_damaged_compilation_in_the_settings_is_an_error_that_names_the_file(tmp_path, compilation):
    begun(tmp_path).close()
    (tmp_path / "settings.json").write_text(f'{{"conditions": {json.dumps(NOW)}, "compilation": {compilation}}}')
    with pytest.raises(UserError, match="settings.json: this file is damaged .* --force"):
        begun(tmp_path, resume=True)


@pytest.mark.parametrize(
    "content",
    ("", "[]", "{}", '{"compilation": null}', "\0", '{"conditions": [], "compilation": null}',
     '{"conditions": null, "compilation": null}'),
)  # fmt: skip
def test_damaged_settings_are_an_error_that_names_the_file(tmp_path, content):
    begun(tmp_path).close()
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UserError, match="settings.json: this file is damaged .* --force"):
        begun(tmp_path, resume=True)


def test_a_run_is_finished_if_its_results_are_there(tmp_path):
    begun(tmp_path / PROGRESS_FOLDER).close()
    mark_finished(tmp_path)
    assert not (resumed := begun(tmp_path / PROGRESS_FOLDER, resume=True)).kept.finished
    resumed.close()
    (tmp_path / "result.json").write_text("{}")
    assert (resumed := begun(tmp_path / PROGRESS_FOLDER, resume=True)).kept.finished
    resumed.close()


@pytest.mark.parametrize("lost", ("result.json", "report.html", "per_image.csv"))
def test_a_run_is_not_finished_if_a_file_of_its_results_is_gone(tmp_path, lost):
    begun(tmp_path / PROGRESS_FOLDER).close()
    for name in ("result.json", "report.html", "per_image.csv"):
        (tmp_path / name).touch()
    mark_finished(tmp_path)
    (tmp_path / lost).unlink()
    assert not (resumed := begun(tmp_path / PROGRESS_FOLDER, resume=True)).kept.finished
    resumed.close()


def test_a_new_run_removes_no_files_of_others(tmp_path):
    """With --force, the folder `progress` may be one that somebody else has made."""
    folder = tmp_path / PROGRESS_FOLDER
    (folder / "pictures").mkdir(parents=True)
    others = [folder / name for name in ("thesis.txt", "images-a.jsonl", "network.safetensors.bak", "pictures/a.png")]
    for path in (*others, folder / ".settings.json.1", folder / "images-12.jsonl", tmp_path / ".report.html.7"):
        path.write_text("x")
    begun(folder).close()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {
        *others, folder / "settings.json", folder / "lock",
    }  # fmt: skip


def test_records_of_a_run_under_other_conditions_are_dropped(tmp_path, caplog):
    begun(tmp_path / "a").close()
    keep_images(tmp_path / "a", IMAGES, 0, [0, 1])
    begun(tmp_path / "b", {"--execute": True}).close()
    (tmp_path / "a" / "images-0.jsonl").rename(tmp_path / "b" / "images-0.jsonl")
    progress = begun(tmp_path / "b", {"--execute": True}, resume=True)
    assert progress.remaining(IMAGES, np.arange(2)).tolist() == [0, 1]
    assert "dropped 2 records, torn when the earlier run stopped, damaged since or of another run" in caplog.text
    progress.close()


@pytest.mark.parametrize("content", (b"", b"noise" * 100, None))
def test_a_damaged_network_is_an_error_that_names_the_file(tmp_path, toy_sim, content):
    progress = begun(tmp_path)
    progress.keep_network(toy_sim, Calibration(4, "Calibrated."), None, False)
    path = tmp_path / "network.safetensors"
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(UserError, match="network.safetensors: this file is damaged .* Delete it and .* --resume"):
        progress.restore_network(toy_sim)
    progress.close()


def make_file(path):
    path.touch()


def make_dangling_link(path):
    path.symlink_to("nowhere/else")


@pytest.mark.parametrize("make", (make_file, make_dangling_link))
def test_a_folder_in_which_nothing_can_be_kept_is_named(tmp_path, make):
    make(tmp_path / PROGRESS_FOLDER)
    with pytest.raises(
        UserError, match=f"--output-dir {tmp_path}: .* be kept in .*{PROGRESS_FOLDER} .* another folder"
    ):
        begun(tmp_path / PROGRESS_FOLDER)


@pytest.mark.parametrize("number", (errno.ENOLCK, errno.EIO))
def test_a_disk_on_which_no_lock_can_be_taken_is_named(tmp_path, monkeypatch, number):
    def acquire(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("ffnet.run.storage.FileLock.acquire", acquire)
    with pytest.raises(UserError, match=f"--output-dir .*{os.strerror(number)}.* another folder"):
        begun(tmp_path / PROGRESS_FOLDER)


def test_a_rank_on_a_node_without_the_folder_keeps_its_records_there(tmp_path):
    folder = tmp_path / "other node" / PROGRESS_FOLDER
    with Progress(folder, rank=3).records(IMAGES) as records:
        records.append([4], random_scores(1))
    assert [path.name for path in folder.iterdir()] == ["images-3.jsonl"]


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    progress = Progress()
    progress.begin(NOW, resume=True)
    progress.keep_compilation(("FP32",), "")
    progress.keep_network(None, None, None, rounded=False)
    with progress.records(IMAGES) as records:
        assert records is None
    progress.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rounded", (False, True))
def test_a_kept_simulation_is_restored_to_the_last_bit(tmp_path, toy_sim, rounded):
    """Into an uncalibrated simulation with other weights: these are replaced only if the kept ones are rounded."""
    progress = begun(tmp_path)
    calibration, recovery = Calibration(4, "Calibrated."), small_recovery() if rounded else None
    progress.keep_network(toy_sim, calibration, recovery, rounded)
    other = build_quantsim(equalize(toy_model()), QuantizationConfig(param_bw=4))
    if rounded:
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.add_(1)
    assert progress.restore_network(other) == (calibration, recovery)
    assert encodings(other) == encodings(toy_sim)
    if not rounded:
        assert torch.equal(logits(other.model, random_batches()[0]), logits(toy_sim.model, random_batches()[0]))
    weights = {name: state.parameter for name, state in read_state(toy_sim).items() if state.parameter is not None}
    assert all(torch.equal(read_state(other)[name].parameter, weight) for name, weight in weights.items())
    assert json.loads((tmp_path / "settings.json").read_text())["conditions"] == NOW
