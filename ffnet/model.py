"""FFNet as plain torch modules, whose attribute names are the keys of the published checkpoints.

Source: arXiv 2206.08236. `tests/data/golden.json` holds outputs of the original implementation.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from ffnet.labels import CITYSCAPES, UNKNOWN
from ffnet.system.errors import UserError
from ffnet.variants import SegHead, Variant, find_variant

PUBLISHED_CLASSES = len(CITYSCAPES.classes)  # classes of the published weights
EXPANSION = 4  # ratio of a Bottleneck block's output channels to its inner ones


class GaussianConv2D(nn.Module):
    """A depthwise 5x5 Gaussian with stride 2 and no padding: (N, 3, H, W) -> (N, 3, (H - 5) // 2 + 1, ...)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, channels: int = 3, kernel_size: int = 5, sigma: float = 0.7) -> None:
        super().__init__()
        self.stride = 2
        self.groups = channels
        self.register_buffer("weight", gaussian_kernel(kernel_size, sigma).repeat(channels, 1, 1, 1))
        self.register_buffer("bias", None)  # (channels,) if a file's equalization gave it one

    def forward(self, x: Tensor) -> Tensor:
        """Smooth and halve a batch of images."""
        return F.conv2d(x, self.weight, self.bias, stride=self.stride, groups=self.groups)


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """Return a unit impulse smoothed by scipy's Gaussian with its default boundary: (1, 1, size, size), float32."""
    impulse = np.zeros((size, size))
    impulse[size // 2, size // 2] = 1.0
    return torch.from_numpy(gaussian_filter(impulse, sigma)).float()[None, None]


class ConvBNReLU(nn.Module):
    """A convolution without bias, a batch norm and a ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three layers."""
        return self.layers(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the convolutions' output to the shortcut's."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return self.relu(y + x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut around them; `outputs` counts the channels after the expansion."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // EXPANSION
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the convolutions' output to the shortcut's."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return self.relu(y + x)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """Return the 1x1 convolution that a shortcut needs if channels or resolution change, else None."""
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class Backbone(nn.Module):
    """A stem, then three or four residual stages: (N, 3, H, W) -> four feature maps, finest first."""

    stem: Sequence[str]  # names of the layers before the stages, in the order in which they are applied

    def add_stages(self, variant: Variant, inputs: int) -> None:
        """Add the stages `layer1`, `layer2` ..., each a sequence of blocks; `inputs` channels enter the first."""
        block: type[BasicBlock | Bottleneck] = Bottleneck if variant.bottleneck else BasicBlock
        widths = feature_channels(variant)[-len(variant.blocks) :]
        self.stages = [f"layer{number}" for number in range(1, len(widths) + 1)]
        for name, count, stride, outputs in zip(self.stages, variant.blocks, variant.strides, widths, strict=True):
            rest = [block(outputs, outputs, 1) for _ in range(count - 1)]
            setattr(self, name, nn.Sequential(block(inputs, outputs, stride), *rest))
            inputs = outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return four feature maps: the outputs of the last four stages, or of the stem and all three stages."""
        for name in self.stem:
            x = getattr(self, name)(x)
        maps = [x]
        for name in self.stages:
            maps.append(getattr(self, name)(maps[-1]))
        return maps[-4:]


def feature_channels(variant: Variant) -> list[int]:
    """Return the channels of the four feature maps, finest first."""
    return [channels * (EXPANSION if variant.bottleneck else 1) for channels in variant.channels]


class PlainBackbone(Backbone):
    """A 7x7 convolution and a max pool, then four stages."""

    stem = ("conv1", "bn1", "relu", "maxpool")

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.add_stages(variant, 64)


class ConvBackbone(Backbone):
    """3x3 convolutions, then the stages; before three stages, their output is the first feature map."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        width = variant.channels[0]
        channels, strides = ((3, 64, 64, width), (2, 2, 1)) if variant.stem == "C" else ((3, width // 2, width), (2, 2))
        for number, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
            setattr(self, f"conv{number}", nn.Conv2d(inputs, outputs, 3, strides[number], padding=1, bias=False))
            setattr(self, f"bn{number}", nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU()
        self.stem = [name for number in range(len(strides)) for name in (f"conv{number}", f"bn{number}", "relu")]
        self.add_stages(variant, width)


def resize(x: Tensor, like: Tensor, mode: str) -> Tensor:
    """Return `x` at the height and width of `like`, which may be odd; `mode` is "nearest" or "bilinear"."""
    return F.interpolate(x, size=like.shape[2:], mode=mode, align_corners=None if mode == "nearest" else True)


class Adapter(nn.Module):
    """A 1x1 ConvBNReLU for each of the four feature maps."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        super().__init__()
        self.adapter_conv = nn.ModuleList(ConvBNReLU(i, o, 1) for i, o in zip(inputs, outputs, strict=True))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the four feature maps with their new channels."""
        return [conv(x) for conv, x in zip(self.adapter_conv, maps, strict=True)]


class UpBranch(nn.Module):
    """Upsamples each coarse map and adds it to the next finer one: four feature maps in, four out."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int], mode: str) -> None:
        super().__init__()
        self.fam_32_sm = ConvBNReLU(inputs[3], outputs[3], 3)
        self.fam_32_up = ConvBNReLU(inputs[3], inputs[2], 1)
        self.fam_16_sm = ConvBNReLU(inputs[2], outputs[2], 3)
        self.fam_16_up = ConvBNReLU(inputs[2], inputs[1], 1)
        self.fam_8_sm = ConvBNReLU(inputs[1], outputs[1], 3)
        self.fam_8_up = ConvBNReLU(inputs[1], inputs[0], 1)
        self.fam_4 = ConvBNReLU(inputs[0], outputs[0], 3)
        self.mode = mode

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Fuse the feature maps, finest first."""
        x4, x8, x16, x32 = maps
        x16 = x16 + resize(self.fam_32_up(x32), x16, self.mode)
        x8 = x8 + resize(self.fam_16_up(x16), x8, self.mode)
        x4 = x4 + resize(self.fam_8_up(x8), x4, self.mode)
        return self.fam_4(x4), self.fam_8_sm(x8), self.fam_16_sm(x16), self.fam_32_sm(x32)


class UpsampleConcat(nn.Module):
    """Resizes all feature maps to the size of the first and concatenates their channels."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Concatenate the feature maps, finest first."""
        finest, *others = maps
        return torch.cat([finest, *(resize(x, finest, self.mode) for x in others)], dim=1)


class SegmentationHead(nn.Module):
    """A 3x3 convolution, a batch norm, a ReLU and the convolution that classifies; both convolutions have a bias."""

    def __init__(self, inputs: int, head: SegHead, classes: int) -> None:
        super().__init__()
        self.last_layer = nn.Sequential(
            nn.Conv2d(inputs, head.middle, 3, padding=1),
            nn.BatchNorm2d(head.middle),
            nn.ReLU(),
            nn.Conv2d(head.middle, classes, head.last_kernel, padding=head.last_kernel // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes, h, w)."""
        return self.last_layer(x)


class Head(nn.Module):
    """Adapter, up-branch, concatenation and classifier: four feature maps -> logits (N, classes, h, w)."""

    def __init__(self, variant: Variant, classes: int) -> None:
        super().__init__()
        head = variant.up_head
        self.layers = nn.Sequential(
            Adapter(feature_channels(variant), head.adapter),
            UpBranch(head.adapter, head.up, variant.upsampling),
            UpsampleConcat(variant.upsampling),
            SegmentationHead(sum(head.up), variant.seg_head, classes),
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (N, classes, h, w) of the four feature maps, finest first."""
        return self.layers(maps)


class FFNet(nn.Module):
    """The network: normalized RGB images (N, 3, H, W), float32 -> logits (N, classes, h, w).

    h and w are a quarter or an eighth of the backbone's input, which a pre_down variant halves first.
    """

    def __init__(self, variant: Variant, classes: int = PUBLISHED_CLASSES) -> None:
        super().__init__()
        self.classes = classes
        self.smoothing = GaussianConv2D() if variant.pre_down else None
        self.backbone_model = (PlainBackbone if variant.stem == "A" else ConvBackbone)(variant)
        self.head = Head(variant, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        if self.smoothing is not None:
            # Only the height is padded, as in the original, with which the weights were trained.
            x = self.smoothing(F.pad(x, (0, 0, 1, 1), mode="reflect"))
        return self.head(self.backbone_model(x))


def build_model(name: str, classes: int = PUBLISHED_CLASSES) -> FFNet:
    """Return the FFNet of a variant for a number of classes, in eval mode, with torch's initial weights."""
    if not (isinstance(classes, int) and 2 <= classes <= UNKNOWN):
        raise UserError(f"classes: this is {classes!r}. Give a number from 2 to {UNKNOWN}.")
    return FFNet(find_variant(name), classes).eval()


def build_without_weights(name: str, classes: int = PUBLISHED_CLASSES) -> FFNet:
    """Return the FFNet of a variant on the meta device, which takes no memory for its weights."""
    with torch.device("meta"):
        return build_model(name, classes)


def count_parameters(network: nn.Module) -> int:
    """Return the number of parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def remove_batch_norms(model: FFNet) -> FFNet:
    """Replace each batch norm of `model` by an Identity, and give each convolution a bias; return the model.

    This is the structure of an equalized checkpoint. The new biases are zero and the batch norms' statistics are lost,
    so the tensors must then be loaded from such a checkpoint.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels, device=module.weight.device))
    return model
