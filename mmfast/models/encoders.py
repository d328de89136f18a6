"""Encoders: from one modality's array [N, ...] to features [N, D]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mmfast.errors import dtype_name
from mmfast.models._checks import check_dropout, check_size


class Encoder(nn.Module):
    """Base of the encoders: checks its input and ends in features of `dim` dimensions.

    Args:
        letters: the dimension letters of a sample, as "T, F".
        sizes: the size each of them must have; None takes any size of at least 1.
        dim: D, the number of features.
    """

    def __init__(self, letters: str, sizes: Sequence[int | None], dim: int) -> None:
        super().__init__()
        self.letters = letters
        self.sizes = tuple(sizes)
        self.dim = check_size("dim", dim)

    def check_input(self, x: object, name: str = "input") -> None:
        """Raise unless `x` is a floating-point tensor [N, ...] of samples this encoder takes; N may be 0."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {dtype_name(x.dtype)}")
        if x.dim() == 1 + len(self.sizes) and all(
            size == want if want is not None else size >= 1
            for size, want in zip(x.shape[1:], self.sizes, strict=True)
        ):
            return
        letters = self.letters.split(", ")
        known = [
            letter if size is None else str(size) for letter, size in zip(letters, self.sizes, strict=True)
        ]
        raise ValueError(
            f"{name} must have shape [N, {self.letters}] = [N, {', '.join(known)}], got {list(x.shape)}"
        )


class MLP(Encoder):
    """Multilayer perceptron for vectors: every layer is linear, layer norm, ReLU.

    Layer norm keeps the features' scale near sqrt(D / 2) whatever the input's, so that learning rates from
    1e-3 (SGD or Adam) to 1e-2 (SGD) train some hundred samples within tens of epochs, and temperatures on dot
    products of features keep their meaning.

    Args:
        in_features: size of an input vector.
        dim: D, the number of features.
        hidden: sizes of the hidden layers; () leaves one layer.
        dropout: dropout after each hidden layer in training.
    """

    def __init__(
        self, in_features: int, dim: int, *, hidden: Sequence[int] = (128,), dropout: float = 0.0
    ) -> None:
        super().__init__("D", (check_size("in_features", in_features),), dim)
        sizes = [in_features, *(check_size(f"hidden[{i}]", size) for i, size in enumerate(hidden))]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [_feature_layer(fan_in, fan_out), nn.Dropout(check_dropout(dropout))]
        self.layers = nn.Sequential(*layers, _feature_layer(sizes[-1], dim))

    def forward(
        self,
        x: Tensor,  # [N, D_in]
    ) -> Tensor:  # [N, D]
        self.check_input(x)
        return self.layers(x)


class TemporalConv(Encoder):
    """Convolutions over time for sequences of any length, pooled over time by mean and maximum.

    Every block halves the time axis (convolution of stride 2, group norm, ReLU). Group norm looks at one
    sample only: there are no running statistics, and a batch of one trains.

    Args:
        in_features: F, features per time step.
        dim: D, the number of features.
        channels: output channels of the blocks.
        kernel_size: time steps a convolution sees; odd.
        dropout: dropout before the last layer in training.
    """

    def __init__(
        self,
        in_features: int,
        dim: int,
        *,
        channels: Sequence[int] = (64, 64, 128),
        kernel_size: int = 5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__("T, F", (None, check_size("in_features", in_features)), dim)
        if check_size("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        sizes = _channel_sizes(in_features, channels)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv1d(fan_in, fan_out, kernel_size, stride=2, padding=kernel_size // 2, bias=False),
                    _group_norm(fan_out),
                    nn.ReLU(),
                )
                for fan_in, fan_out in pairwise(sizes)
            )
        )
        self.dropout = nn.Dropout(check_dropout(dropout))
        self.features = _feature_layer(2 * sizes[-1], dim)

    def forward(
        self,
        x: Tensor,  # [N, T, F]
    ) -> Tensor:  # [N, D]
        self.check_input(x)
        return self.features(self.dropout(_mean_and_max(self.blocks(x.transpose(1, 2)), (2,))))


class GRUEncoder(Encoder):
    """Bidirectional gated recurrent unit for sequences of any length, pooled over time by mean and maximum.

    Args:
        in_features: F, features per time step.
        dim: D, the number of features.
        hidden: state size of each direction.
        num_layers: stacked layers.
        dropout: dropout between and after the layers in training.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014.
    """

    def __init__(
        self, in_features: int, dim: int, *, hidden: int = 64, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__("T, F", (None, check_size("in_features", in_features)), dim)
        check_size("hidden", hidden)
        check_dropout(dropout)
        self.gru = nn.GRU(
            in_features,
            hidden,
            check_size("num_layers", num_layers),
            batch_first=True,
            # torch warns where there is no second layer for the dropout to come before.
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=True,
        )
        self.dropout = nn.Dropout(dropout)
        self.features = _feature_layer(4 * hidden, dim)

    def forward(
        self,
        x: Tensor,  # [N, T, F]
    ) -> Tensor:  # [N, D]
        self.check_input(x)
        return self.features(self.dropout(_mean_and_max(self.gru(x)[0], (1,))))


class SmallCNN(Encoder):
    """Small convolutional network for images of any size, pooled over positions by mean and maximum.

    Every block is a 3 x 3 convolution, group norm, ReLU and, but for the last, 2 x 2 max pooling. Group norm
    looks at one sample only: there are no running statistics, and a batch of one trains. With the
    mean alone, strokes in mostly empty images take several times as many epochs to learn.

    Args:
        in_channels: C, channels of an image.
        dim: D, the number of features.
        channels: output channels of the blocks.
        dropout: dropout before the last layer in training.
    """

    def __init__(
        self, in_channels: int, dim: int, *, channels: Sequence[int] = (16, 32, 64), dropout: float = 0.0
    ) -> None:
        super().__init__("C, H, W", (check_size("in_channels", in_channels), None, None), dim)
        sizes = _channel_sizes(in_channels, channels)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            if layers:
                # Rounding up lets images of any size through every block.
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), _group_norm(fan_out), nn.ReLU()]
        self.blocks = nn.Sequential(*layers)
        self.dropout = nn.Dropout(check_dropout(dropout))
        self.features = _feature_layer(2 * sizes[-1], dim)

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, D]
        self.check_input(x)
        return self.features(self.dropout(_mean_and_max(self.blocks(x), (2, 3))))


class FrameMean(Encoder):
    """An image encoder applied to every frame of a video, its features averaged over time.

    Equivalent to:

        features = torch.stack([encoder(x[:, t]) for t in range(T)]).mean(0)

    in one call of the encoder on all N T frames, so batch norm there takes its statistics over all of them.

    Args:
        encoder: maps images [N, C, H, W] to [N, D].
    """

    def __init__(self, encoder: Encoder) -> None:
        if not isinstance(encoder, Encoder) or len(encoder.sizes) != 3:
            raise TypeError(f"encoder must be an image Encoder, got {type(encoder).__name__}")
        super().__init__(f"T, {encoder.letters}", (None, *encoder.sizes), encoder.dim)
        self.encoder = encoder

    def forward(
        self,
        x: Tensor,  # [N, T, C, H, W]
    ) -> Tensor:  # [N, D]
        self.check_input(x)
        return self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


def _feature_layer(fan_in: int, fan_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(fan_in, fan_out), nn.LayerNorm(fan_out), nn.ReLU())


def _mean_and_max(
    x: Tensor,  # [N, ..., C, ...]
    dims: tuple[int, ...],  # time or positions
) -> Tensor:  # [N, 2 C]
    return torch.cat([x.mean(dims), x.amax(dims)], dim=1)


def _group_norm(channels: int) -> nn.GroupNorm:
    # Up to 8 groups, of two channels or more: one channel at one position has no variance.
    return nn.GroupNorm(math.gcd(8, channels // 2) if channels % 2 == 0 else 1, channels)


def _channel_sizes(in_channels: int, channels: Sequence[int]) -> list[int]:
    if len(channels) == 0:
        raise ValueError("channels must hold at least one block, got none")
    return [in_channels, *(check_size(f"channels[{i}]", size) for i, size in enumerate(channels))]
