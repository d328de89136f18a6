"""ResNet-18 for images and spectrograms of any number of channels."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.models._checks import check_dropout, check_size
from mmfast.models.encoders import Encoder


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut, projected where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(
        self,
        x: Tensor,  # [N, C_in, H, W]
    ) -> Tensor:  # [N, C_out, H / stride, W / stride]
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class ResNet18(Encoder):
    """ResNet-18 as published, its 512 averaged features projected to `dim` where that differs.

    Parameters have the usual names, so published weights load with `strict=False` (three channels, standard
    stem). Batch norm needs more than one value per channel to train, so a batch of one image trains only
    where a side is longer than 32 (8 with the small stem).

    Args:
        in_channels: C, channels of an image: 1 for spectrograms, 3 for colour.
        dim: D, the number of features; 512 leaves the projection out.
        small_stem: a 3 x 3 convolution of stride 1 without pooling in place of the 7 x 7 of stride 2 with
            pooling, for images of about 32 x 32.
        dropout: dropout of the averaged features in training.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016, table 1; initialisation He
    et al., "Delving deep into rectifiers", ICCV 2015, by fan-out; small stem as in section 4.2 of the former.
    """

    def __init__(
        self, in_channels: int = 3, dim: int = 512, *, small_stem: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__("C, H, W", (check_size("in_channels", in_channels), None, None), dim)
        kernel, stride, padding = (3, 1, 1) if small_stem else (7, 2, 3)
        self.conv1 = nn.Conv2d(in_channels, 64, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        self.layer1 = _layer(64, 64, 1)
        self.layer2 = _layer(64, 128, 2)
        self.layer3 = _layer(128, 256, 2)
        self.layer4 = _layer(256, 512, 2)
        self.dropout = nn.Dropout(check_dropout(dropout))
        self.projection = nn.Identity() if dim == 512 else nn.Linear(512, dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, D]
        self.check_input(x)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.projection(self.dropout(x.mean((2, 3))))


def _layer(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1))
