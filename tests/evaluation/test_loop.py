"""The evaluation loop: every image is counted once, in order, whatever the batches."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import ffnet
from ffnet.config import Runtime
from ffnet.evaluation.compilation import FixedBatchSize, PreparedBackends, prepare_backends
from ffnet.evaluation.loading import normalize
from ffnet.evaluation.loop import calibration_batches, evaluate, score_batches, smaller_batch_size
from ffnet.evaluation.postprocessing import predict
from ffnet.evaluation.scores import concatenate
from ffnet.system.errors import UserError
from tests.helpers.networks import DEMO, golden_model

OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory")


class OneLayer(nn.Module):
    """A network of one convolution; raises what a full GPU raises for more than `limit` images."""

    def __init__(self, limit=None, seed=0, error=OUT_OF_MEMORY):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 19, 8, stride=8)
        self.limit, self.error = limit, error
        self.images_run = 0

    def forward(self, x):
        if self.limit is not None and len(x) > self.limit:
            raise self.error
        self.images_run += len(x)
        return torch.cat([self.conv(image) for image in x.split(1)])  # the same bits for any batch size


def scores_of(images, model=None, batch_size=2, num_workers=0):
    backends = {"FP32": model or OneLayer(), "INT8": OneLayer(seed=1)}
    return evaluate(backends, images, Runtime(batch_size=batch_size, num_workers=num_workers, progress=False))


def assert_equal(scores, others):
    for found, expected in (
        (scores.confusion_matrices, others.confusion_matrices),
        (scores.agreeing_pixels, others.agreeing_pixels),
    ):
        assert list(found) == list(expected)
        assert all(np.array_equal(found[key], expected[key]) for key in found)


def test_each_images_scores_equal_those_of_its_predictions(cityscapes):
    scores = scores_of(cityscapes)
    assert scores.confusion_matrices["FP32"].shape == (7, 19, 19) and scores.pixels_per_image == 64 * 128
    for index, (image, labels) in enumerate(cityscapes):
        with torch.no_grad():
            fp32, int8 = (
                predict(model(normalize(image[None])), labels.shape)[0] for model in (OneLayer(), OneLayer(seed=1))
            )
        assert scores.confusion_matrices["FP32"][index].sum() == (labels < 19).sum()
        assert np.trace(scores.confusion_matrices["FP32"][index]) == (fp32 == labels).sum()
        assert scores.agreeing_pixels["FP32", "INT8"][index] == (fp32 == int8).sum()


@pytest.mark.parametrize(("batch_size", "num_workers"), ((1, 0), (3, 0), (8, 0), (2, 2)))
def test_batch_size_and_workers_change_no_count(cityscapes, batch_size, num_workers):
    scores = scores_of(cityscapes, batch_size=batch_size, num_workers=num_workers)
    assert_equal(scores, scores_of(cityscapes))
    assert scores.batch_size is None and min(scores.seconds.values()) > 0


def test_the_order_of_images_changes_no_count(cityscapes):
    order = [3, 1, 6, 0, 5, 2, 4]
    shuffled = scores_of(Subset(cityscapes, order)).confusion_matrices["INT8"]
    assert np.array_equal(shuffled, scores_of(cityscapes).confusion_matrices["INT8"][order])


def test_no_images_have_empty_scores(cityscapes):
    scores = scores_of(Subset(cityscapes, []))
    assert scores.images == 0 and scores.confusion_matrices["FP32"].shape == (0, 19, 19)
    assert scores.agreeing_pixels["FP32", "INT8"].shape == (0,) and scores.total("INT8").sum() == 0


def test_the_public_function_takes_a_plain_dictionary(cityscapes):
    backends = {"FP32": OneLayer(), "INT8": OneLayer(seed=1)}
    assert_equal(ffnet.evaluate(backends, cityscapes), scores_of(cityscapes))


def test_progress_is_shown_on_stderr_with_the_miou_of_every_backend(cityscapes, capsys):
    evaluate({"FP32": OneLayer()}, cityscapes)
    list(calibration_batches(cityscapes, Runtime()))
    shown = capsys.readouterr()
    assert "evaluate: 100%" in shown.err and "FP32 " in shown.err and "calibrate: 100%" in shown.err
    assert not shown.out


@pytest.mark.parametrize("limit", (1, 2, 3))
def test_out_of_memory_halves_the_batch_size_and_loses_no_image(cityscapes, capsys, limit):
    model = OneLayer(limit)
    scores = scores_of(cityscapes, model, batch_size=5)
    assert_equal(scores, scores_of(cityscapes))
    assert model.images_run == 7
    assert scores.batch_size == {1: 1, 2: 2, 3: 2}[limit]
    assert "Out of GPU memory" in capsys.readouterr().err


def test_a_lack_of_memory_that_cudnn_reports_halves_the_batch_size_too(cityscapes):
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    scores = scores_of(cityscapes, OneLayer(2, error=error), batch_size=4)
    assert scores.batch_size == 2
    assert_equal(scores, scores_of(cityscapes))


def test_errors_that_are_no_lack_of_memory_stay_as_they_are(cityscapes):
    error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError) as caught:
        scores_of(cityscapes, OneLayer(1, error=error))
    assert caught.value is error


def test_tensors_of_a_batch_that_did_not_fit_are_freed_before_the_next_one():
    alive = []

    def fail():
        tensor = torch.ones(1)
        alive.append(weakref.ref(tensor))
        raise OUT_OF_MEMORY

    try:
        fail()
    except RuntimeError as error:
        assert smaller_batch_size(4, error) == 2
        assert alive[0]() is None


@pytest.mark.parametrize("limit", (1, 2, 4))
def test_out_of_memory_halves_the_batch_size_of_all_compiled_backends(cityscapes, limit):
    """A batch that is filled up to the compiled size must not stay too large."""
    model, other = FixedBatchSize(OneLayer(limit), 5), FixedBatchSize(OneLayer(seed=1), 5)
    scores = evaluate({"FP32": model, "INT8": other}, cityscapes, Runtime(batch_size=5))
    assert_equal(scores, scores_of(cityscapes))
    assert other.batch_size <= limit and other.backend.images_run < 7 + limit


@pytest.mark.parametrize("images", (1, 3))
def test_images_that_only_do_not_fit_with_those_that_pad_them_are_scored(cityscapes, images):
    """The compiled network pads them to 8 images, of which the memory holds 4."""
    few = Subset(cityscapes, range(images))
    backend = FixedBatchSize(OneLayer(4), 8)
    scores = evaluate({"FP32": backend}, few, Runtime(batch_size=8))
    assert_equal(scores, evaluate({"FP32": OneLayer()}, few))
    assert backend.batch_size == scores.batch_size == 4


def test_several_models_have_the_scores_of_their_own_and_decode_an_image_once(cityscapes):
    models = [{"FP32": OneLayer(), "INT8": OneLayer(seed=1)}, {"FP32": OneLayer(seed=2)}]
    counted, prepared = CountedImages(cityscapes), [PreparedBackends(backends) for backends in models]
    for wanted in (None, np.array([[1, 1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 1, 1]], bool)):
        counted.read.clear()
        batches = list(score_batches(prepared, counted, Runtime(batch_size=3, progress=False), wanted=wanted))
        assert counted.read == list(range(7))
        for model, backends in enumerate(models):
            chosen = [7 * [True], 7 * [True]][model] if wanted is None else wanted[model]
            pieces = [batch for batch in batches if batch.model == model]
            assert np.concatenate([piece.positions for piece in pieces]).tolist() == np.flatnonzero(chosen).tolist()
            alone = evaluate(backends, Subset(cityscapes, np.flatnonzero(chosen).tolist()), Runtime(progress=False))
            assert_equal(concatenate([piece.scores for piece in pieces]), alone)


class CountedImages(torch.utils.data.Dataset):
    """The images of another dataset, and the indices of those that were read."""

    def __init__(self, images):
        self.images, self.read = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.read.append(index)
        return self.images[index]


def test_out_of_memory_in_one_model_halves_the_batches_of_all(cityscapes):
    models = [PreparedBackends({"FP32": FixedBatchSize(OneLayer(limit), 4)}) for limit in (None, 1)]
    batches = list(score_batches(models, cityscapes, Runtime(batch_size=4, progress=False)))
    for model in range(2):
        scores = concatenate([batch.scores for batch in batches if batch.model == model])
        assert_equal(scores, evaluate({"FP32": OneLayer()}, cityscapes, Runtime(progress=False)))
    assert [prepared.backends["FP32"].batch_size for prepared in models] == [1, 1]


def test_one_image_that_is_too_large_is_an_error(cityscapes):
    with pytest.raises(UserError, match="GPU: its memory does not suffice for one image"):
        scores_of(cityscapes, OneLayer(0))


def test_logits_that_are_not_finite_are_an_error(cityscapes):
    model = OneLayer()
    model.conv.bias.data[3] = torch.nan
    with pytest.raises(UserError, match="FP32: .* not finite"):
        scores_of(cityscapes, model)


@pytest.mark.cuda
def test_a_gpu_scores_like_the_cpu(cityscapes, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    totals = [scores_on(torch.device(name), cityscapes) for name in ("cpu", "cuda")]
    for backend, share in (("FP32", 0.001), ("INT8", 0.01)):
        on_cpu, on_gpu = (scores.total(backend) for scores in totals)
        assert np.abs(on_cpu - on_gpu).sum() / 2 <= share * on_cpu.sum() and on_gpu.sum() == on_cpu.sum()


def scores_on(device, images):
    """Scores of a network and its lowered simulation, which is calibrated on the same device."""
    runtime = Runtime(device, batch_size=2)
    model = golden_model(DEMO).to(device)
    backends = {"FP32": model, "INT8": ffnet.lower(ffnet.quantize(model, images, runtime=runtime))}
    return evaluate(prepare_backends(backends, runtime), images, runtime)
