"""The evaluation loop: every image is counted once, in order, whatever the batches."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import ffnet
from ffnet.config import Runtime
from ffnet.evaluation.compilation import PreparedBackends, prepare_backends
from ffnet.evaluation.loading import normalize
from ffnet.evaluation.loop import calibration_batches, evaluate, score_batches, with_backoff
from ffnet.evaluation.postprocessing import predict
from ffnet.evaluation.scores import concatenate
from ffnet.system.errors import UserError
from tests.helpers.networks import DEMO, golden_model

OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory")
CUDNN_ERROR = RuntimeError("GET was unable to find an engine to execute this computation")


class OneLayer(nn.Module):
    """A network of one convolution; raises what a full GPU raises for more than `limit` images."""

    def __init__(self, limit=None, seed=0, error=OUT_OF_MEMORY):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 19, 8, stride=8)
        self.eval()
        self.limit, self.error = limit, error
        self.images_run = 0

    def forward(self, x):
        if self.limit is not None and len(x) > self.limit:
            raise self.error
        self.images_run += len(x)
        return torch.cat([self.conv(image) for image in x.split(1)])  # the same bits for any batch size


def scores_of(images, model=None, **settings):
    backends = {"FP32": model or OneLayer(), "INT8": OneLayer(seed=1)}
    return evaluate(backends, images, Runtime(quiet=True, **settings))


def assert_equal(scores, others):
    for found, expected in (
        (scores.confusion_matrices, others.confusion_matrices),
        (scores.agreeing_pixels, others.agreeing_pixels),
    ):
        assert list(found) == list(expected)
        assert all(np.array_equal(found[key], expected[key]) for key in found)


def test_each_images_scores_equal_those_of_its_predictions(cityscapes):
    scores = scores_of(cityscapes)
    assert scores.confusion_matrices["FP32"].shape == (7, 19, 19) and scores.pixels.tolist() == [64 * 128] * 7
    for index, (image, labels) in enumerate(cityscapes):
        with torch.no_grad():
            fp32, int8 = (
                predict(model(normalize(image[None])), labels.shape)[0] for model in (OneLayer(), OneLayer(seed=1))
            )
        assert scores.confusion_matrices["FP32"][index].sum() == (labels < 19).sum()
        assert np.trace(scores.confusion_matrices["FP32"][index]) == (fp32 == labels).sum()
        assert scores.agreeing_pixels["FP32", "INT8"][index] == (fp32 == int8).sum()


@pytest.mark.parametrize(("batch_size", "num_workers"), ((1, 0), (3, 0), (2, 2)))
def test_batch_size_and_workers_change_no_count(cityscapes, batch_size, num_workers):
    scores = scores_of(cityscapes, batch_size=batch_size, num_workers=num_workers)
    assert_equal(scores, scores_of(cityscapes))
    assert scores.batch_size is None and min(scores.seconds.values()) > 0


def test_batches_are_scored_in_order_and_together_give_all_scores(cityscapes):
    prepared = PreparedBackends({"FP32": OneLayer(limit=2), "INT8": OneLayer(seed=1)})
    batches = list(score_batches(prepared, cityscapes, Runtime(batch_size=3, quiet=True)))
    assert np.concatenate([batch.positions for batch in batches]).tolist() == list(range(7))
    assert_equal(concatenate([batch.scores for batch in batches]), scores_of(cityscapes))
    for batch in batches:
        assert [len(ids) for ids in batch.predictions.values()] == 2 * [len(batch.positions)]


def test_no_images_have_empty_scores(cityscapes):
    scores = scores_of(Subset(cityscapes, []))
    assert scores.images == 0 and scores.confusion_matrices["FP32"].shape == (0, 19, 19)
    assert scores.agreeing_pixels["FP32", "INT8"].shape == (0,) and scores.total("INT8").sum() == 0


def test_progress_is_shown_on_stderr_with_the_miou_of_every_backend(cityscapes, capsys):
    evaluate({"FP32": OneLayer()}, cityscapes)
    list(calibration_batches(cityscapes, Runtime()))
    shown = capsys.readouterr()
    assert "evaluate: 100%" in shown.err and "FP32 " in shown.err and "calibrate: 100%" in shown.err
    assert not shown.out


@pytest.mark.parametrize(("limit", "error", "reduced"), ((1, OUT_OF_MEMORY, 1), (3, CUDNN_ERROR, 2)))
def test_out_of_memory_halves_the_batch_size_and_loses_no_image(cityscapes, capsys, limit, error, reduced):
    model = OneLayer(limit, error=error)
    scores = scores_of(cityscapes, model, batch_size=5)
    assert_equal(scores, scores_of(cityscapes))
    assert model.images_run == 7 and scores.batch_size == reduced
    assert "Out of GPU memory" in capsys.readouterr().err


def test_tensors_of_a_batch_that_did_not_fit_are_freed_before_the_next_one():
    tensors = []

    def work(batch_size):
        assert not any(tensor() is not None for tensor in tensors)
        tensor = torch.ones(1)
        tensors.append(weakref.ref(tensor))
        if batch_size > 1:
            raise OUT_OF_MEMORY
        return "done"

    assert with_backoff(work, 4) == ("done", 1) and len(tensors) == 3


def test_one_image_that_is_too_large_is_an_error(cityscapes):
    with pytest.raises(UserError, match="The GPU's memory does not suffice for one image"):
        scores_of(cityscapes, OneLayer(0))


def test_logits_that_are_not_finite_are_an_error(cityscapes):
    model = OneLayer()
    model.conv.bias.data[3] = torch.nan
    with pytest.raises(UserError, match="FP32: .* not finite"):
        scores_of(cityscapes, model)


@pytest.mark.parametrize(
    ("change", "returned"),
    (
        (lambda logits: logits.repeat(1, 2, 1, 1), r"for 7 images this backend returned float32 \[7, 38, 8, 16\] in"),
        (lambda logits: logits[:1], r"float32 \[1, 19, 8, 16\] in place of logits, float \[7, 19, height, width\]"),
        (lambda logits: logits[..., :0], r"float32 \[7, 19, 8, 0\]"),
        (lambda logits: logits.int(), r"int32 \[7, 19, 8, 16\]"),
        (lambda logits: [logits], r"\(float32 \[7, 19, 8, 16\]\)"),
    ),
)
def test_anything_but_logits_of_19_classes_for_each_image_is_an_error(cityscapes, change, returned):
    network = OneLayer()
    with pytest.raises(UserError, match=f"^FP32: .*{returned}"):
        evaluate({"FP32": lambda images: change(network(images))}, cityscapes, Runtime(quiet=True, batch_size=7))


def test_logits_in_float16_whose_sum_exceeds_its_range_are_scored(cityscapes):
    network = OneLayer()
    scores = evaluate({"FP32": lambda images: network(images).half() + 60_000}, cityscapes, Runtime(quiet=True))
    assert scores.images == 7


@pytest.mark.cuda
def test_a_gpu_calibrates_and_scores_like_the_cpu(cityscapes, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    totals = []
    for device in ("cpu", "cuda:0"):
        runtime, model = Runtime(device, batch_size=2), golden_model(DEMO).to(device)
        backends = {"FP32": model, "INT8": ffnet.quantize(model, cityscapes, runtime=runtime).lowered}
        totals.append(evaluate(prepare_backends(backends, runtime), cityscapes, runtime))
    for backend, share in (("FP32", 0.001), ("INT8", 0.01)):
        on_cpu, on_gpu = (scores.total(backend) for scores in totals)
        assert np.abs(on_cpu - on_gpu).sum() / 2 <= share * on_cpu.sum() and on_gpu.sum() == on_cpu.sum()
