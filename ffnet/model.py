"""FFNet as plain torch modules. Attribute names are the keys of the published checkpoints.

Source: arXiv 2206.08236. Written anew; `tests/data/golden.json` holds outputs of the original implementation.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ffnet.variants import NUM_CLASSES, VARIANTS

EXPANSION = 4  # a Bottleneck block's output channels over its inner ones


class GaussianConv2D(nn.Module):
    """Depthwise 5x5 Gaussian with stride 2 and no padding: (N, 3, H, W) -> (N, 3, (H - 5) // 2 + 1, ...)."""

    def __init__(self, channels=3, kernel_size=5, sigma=0.7):
        super().__init__()
        self.stride = 2
        self.groups = channels
        self.register_buffer("weight", gaussian_kernel(kernel_size, sigma).repeat(channels, 1, 1, 1))
        self.register_buffer("bias", None)  # (channels,) in a file whose equalization gave it one

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, stride=self.stride, groups=self.groups)


def gaussian_kernel(size, sigma):
    """A unit impulse smoothed by scipy's Gaussian with its default boundary: (1, 1, size, size), float32."""
    import numpy as np
    from scipy.ndimage import gaussian_filter

    impulse = np.zeros((size, size))
    impulse[size // 2, size // 2] = 1.0
    return torch.from_numpy(gaussian_filter(impulse, sigma)).float()[None, None]


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs, outputs, kernel_size):
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return self.relu(y + x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; `outputs` counts the channels behind the expansion."""

    def __init__(self, inputs, outputs, stride):
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

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return self.relu(y + x)


def shortcut(inputs, outputs, stride):
    """The 1x1 convolution that a residual needs where channels or stride change, else None."""
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def stages(variant, inputs):
    """The residual stages, each a Sequential of blocks; `inputs` channels enter the first."""
    block, expansion = (Bottleneck, EXPANSION) if variant.bottleneck else (BasicBlock, 1)
    widths = variant.channels[-len(variant.blocks) :]
    for count, stride, channels in zip(variant.blocks, variant.strides, widths, strict=True):
        outputs = channels * expansion
        rest = [block(outputs, outputs, 1) for _ in range(count - 1)]
        yield nn.Sequential(block(inputs, outputs, stride), *rest)
        inputs = outputs


class PlainBackbone(nn.Module):
    """7x7 stem and max pool, then four stages: (N, 3, H, W) -> four feature maps, finest first."""

    def __init__(self, variant):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(variant, 64)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x4 = self.layer1(x)
        x8 = self.layer2(x4)
        x16 = self.layer3(x8)
        return x4, x8, x16, self.layer4(x16)


class SlimBackbone(nn.Module):
    """Two strided 3x3 convolutions, then four stages: (N, 3, H, W) -> four feature maps, finest first."""

    def __init__(self, variant):
        super().__init__()
        width = variant.channels[0]
        self.conv0 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(width // 2)
        self.conv1 = nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(variant, width)

    def forward(self, x):
        x = self.relu(self.bn0(self.conv0(x)))
        x = self.relu(self.bn1(self.conv1(x)))
        x4 = self.layer1(x)
        x8 = self.layer2(x4)
        x16 = self.layer3(x8)
        return x4, x8, x16, self.layer4(x16)


class NarrowBackbone(nn.Module):
    """Three 3x3 convolutions, whose output is the first feature map, then three stages."""

    def __init__(self, variant):
        super().__init__()
        width = variant.channels[0]
        self.conv0 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(64)
        self.conv1 = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1, self.layer2, self.layer3 = stages(variant, width)

    def forward(self, x):
        x = self.relu(self.bn0(self.conv0(x)))
        x = self.relu(self.bn1(self.conv1(x)))
        x4 = self.relu(self.bn2(self.conv2(x)))
        x8 = self.layer1(x4)
        x16 = self.layer2(x8)
        return x4, x8, x16, self.layer3(x16)


BACKBONES = {"A": PlainBackbone, "B": SlimBackbone, "C": NarrowBackbone}


class Upsample:
    """Resizes a map to another's height and width; its sizes may be odd, so no factor will do. Holds no tensors."""

    def __init__(self, mode):
        self.options = {"mode": "nearest"} if mode == "nearest" else {"mode": "bilinear", "align_corners": True}

    def __call__(self, x, like):
        return F.interpolate(x, size=like.shape[2:], **self.options)


class Adapter(nn.Module):
    """A 1x1 ConvBNReLU a feature map."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.adapter_conv = nn.ModuleList(ConvBNReLU(i, o, 1) for i, o in zip(inputs, outputs, strict=True))

    def forward(self, maps):
        return [conv(x) for conv, x in zip(self.adapter_conv, maps, strict=True)]


class UpBranch(nn.Module):
    """Carries the coarse maps upwards, adding each to the next finer one: four maps in, four maps out."""

    def __init__(self, inputs, outputs, upsample):
        super().__init__()
        self.fam_32_sm = ConvBNReLU(inputs[3], outputs[3], 3)
        self.fam_32_up = ConvBNReLU(inputs[3], inputs[2], 1)
        self.fam_16_sm = ConvBNReLU(inputs[2], outputs[2], 3)
        self.fam_16_up = ConvBNReLU(inputs[2], inputs[1], 1)
        self.fam_8_sm = ConvBNReLU(inputs[1], outputs[1], 3)
        self.fam_8_up = ConvBNReLU(inputs[1], inputs[0], 1)
        self.fam_4 = ConvBNReLU(inputs[0], outputs[0], 3)
        self.upsample = upsample

    def forward(self, maps):
        x4, x8, x16, x32 = maps
        x16 = x16 + self.upsample(self.fam_32_up(x32), x16)
        x8 = x8 + self.upsample(self.fam_16_up(x16), x8)
        x4 = x4 + self.upsample(self.fam_8_up(x8), x4)
        return self.fam_4(x4), self.fam_8_sm(x8), self.fam_16_sm(x16), self.fam_32_sm(x32)


class UpsampleConcat(nn.Module):
    """All maps at the first one's size, side by side."""

    def __init__(self, upsample):
        super().__init__()
        self.upsample = upsample

    def forward(self, maps):
        finest, *others = maps
        return torch.cat([finest] + [self.upsample(x, finest) for x in others], dim=1)


class SegmentationHead(nn.Module):
    """3x3 convolution, batch norm, ReLU and the classifying convolution, both with bias."""

    def __init__(self, inputs, head):
        super().__init__()
        self.last_layer = nn.Sequential(
            nn.Conv2d(inputs, head.middle, 3, padding=1),
            nn.BatchNorm2d(head.middle),
            nn.ReLU(),
            nn.Conv2d(head.middle, NUM_CLASSES, head.last_kernel, padding=head.last_kernel // 2),
        )

    def forward(self, x):
        return self.last_layer(x)


class Head(nn.Module):
    """Adapter, up-branch, concatenation, classifier: four feature maps -> logits (N, 19, h, w)."""

    def __init__(self, variant):
        super().__init__()
        expansion = EXPANSION if variant.bottleneck else 1
        upsample = Upsample(variant.upsampling)
        head = variant.up_head
        self.layers = nn.Sequential(
            Adapter([c * expansion for c in variant.channels], head.adapter),
            UpBranch(head.adapter, head.up, upsample),
            UpsampleConcat(upsample),
            SegmentationHead(sum(head.up), variant.seg_head),
        )

    def forward(self, maps):
        return self.layers(maps)


class FFNet(nn.Module):
    """(N, 3, H, W) normalized RGB, float32 -> logits (N, 19, h, w): h, w are 1/4 or 1/8 of what the backbone sees."""

    def __init__(self, variant):
        super().__init__()
        self.smoothing = GaussianConv2D() if variant.pre_down else None
        self.backbone_model = BACKBONES[variant.stem](variant)
        self.head = Head(variant)

    def forward(self, x):
        if self.smoothing is not None:
            # Only the height is padded: so the original does it, and so its weights were trained.
            x = self.smoothing(F.pad(x, (0, 0, 1, 1), mode="reflect"))
        return self.head(self.backbone_model(x))


def build_model(name):
    """The named FFNet in eval mode with torch's initial weights; KeyError where VARIANTS lacks the name."""
    return FFNet(VARIANTS[name]).eval()


def fold_batch_norms_away(model):
    """Makes `model` the shape of an equalized checkpoint: Identity for each batch norm, a bias for each convolution.

    The new biases are zero and the statistics are dropped, so the tensors have to come from such a checkpoint.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels, device=module.weight.device))
    return model
