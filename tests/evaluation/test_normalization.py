"""Normalization worked by hand."""

import torch

from ffnet.evaluation.loading import denormalize, memory_format, normalize


def test_images_are_normalized_with_the_published_mean_and_deviation():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert torch.allclose(normalize(image).flatten(), torch.tensor(expected), atol=1e-6)


def test_normalized_bytes_are_restored_exactly():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert torch.equal(denormalize(normalize(image)), image.float())


def test_on_a_gpu_channels_last_comes_with_tf32():
    formats = {(kind, tf32): memory_format(torch.device(kind), tf32) for kind in ("cpu", "cuda") for tf32 in (0, 1)}
    assert formats.pop(("cuda", 0)) is torch.contiguous_format
    assert set(formats.values()) == {torch.channels_last}
