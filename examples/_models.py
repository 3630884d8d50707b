"""Networks for the training example: a small convolutional net, ResNet-20, MobileNetV1, or any torchvision model."""

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class ConvNet(nn.Sequential):
    """Four convolutions, two linear layers, batch norm; for a 28x28 grey image 3.3M MACs and 360k weights.

    With 512 hidden features it has 1.15M weights.
    """

    def __init__(self, channels: int, size: int, num_classes: int, *, hidden: int = 128) -> None:
        layers: list[nn.Module] = []
        for width, stride in ((16, 2), (32, 1), (64, 2), (128, 2)):
            layers += [
                nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels, size = width, -(-size // stride)
        layers += [
            nn.Flatten(),
            nn.Linear(channels * size * size, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        ]
        super().__init__(*layers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut that subsamples and zero-pads (option A of He et al.: no weights)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.padding = width - channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            half = self.padding // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.padding - half))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """The CIFAR ResNet of He et al. (2016): three stages of three blocks, 16-32-64 channels, 270k weights."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, width = [], 16
        for stage_width, stride in ((16, 1), (32, 2), (64, 2)):
            for block in range(3):
                blocks.append(BasicBlock(width, stage_width, stride if block == 0 else 1))
                width = stage_width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al., 2017). Images under 64 pixels skip the first two of its five subsamplings."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        early = 1 if size < 64 else 2
        layers = self._conv_bn(channels, 32, kernel=3, stride=early)
        width = 32
        plan = [(64, 1), (128, early), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
        for out, stride in plan:
            layers += self._conv_bn(width, width, kernel=3, stride=stride, groups=width)
            layers += self._conv_bn(width, out, kernel=1)
            width = out
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(width, num_classes)

    @staticmethod
    def _conv_bn(channels: int, width: int, *, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        return [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


BUILT_IN = ("convnet", "convnet_wide", "resnet20", "mobilenet_v1")


def build_model(arch: str, *, channels: int, size: int, num_classes: int) -> nn.Module:
    """Build a network with fresh weights; names that are not built in are looked up in torchvision (RGB only)."""
    if arch == "convnet":
        return ConvNet(channels, size, num_classes)
    if arch == "convnet_wide":
        return ConvNet(channels, size, num_classes, hidden=512)
    if arch == "resnet20":
        return ResNet20(channels, num_classes)
    if arch == "mobilenet_v1":
        return MobileNetV1(channels, size, num_classes)
    if arch not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(
            f"unknown --arch {arch!r}: choose {', '.join(BUILT_IN)} or an image classifier of torchvision.models "
            f"such as resnet50 or vit_b_16"
        )
    model: nn.Module = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
    if getattr(model, "aux_logits", False):
        raise ValueError(f"--arch {arch}: networks with auxiliary outputs are not supported by this example")
    return model
