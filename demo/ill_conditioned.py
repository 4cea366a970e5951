"""A network that quantization fails on: the same function in FP32, its channels' ranges far apart."""

import copy

import torch

from ffnet.model import BasicBlock

LARGEST = 4  # the factors are powers of two between 2**-4 and 2**4


def ill_conditioned(model, seed=0):
    """A copy of the FFNet in whose blocks `bn1` scales every channel and `conv2` undoes it: exact, being powers of two.

    Cross-layer equalization (arXiv 1906.04721) brings the ranges together again.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for block in model.modules():
        if isinstance(block, BasicBlock):
            exponents = torch.randint(-LARGEST, LARGEST + 1, block.bn1.weight.shape, generator=generator)
            factors = torch.exp2(exponents.float())
            with torch.no_grad():
                block.bn1.weight *= factors
                block.bn1.bias *= factors
                block.conv2.weight /= factors[:, None, None]
    return model
