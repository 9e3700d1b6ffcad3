"""Torch modules as people write them, one of each kind that the exporter must take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class LeNet5(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), (2, 2))
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc1(x))
        return self.fc3(F.relu(self.fc2(x)))


class VGGBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(12 * 16, 20), nn.ReLU6(), nn.Dropout(0.5), nn.Linear(20, 5)
        )

    def forward(self, x):
        return self.classifier(self.features(x))


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(BasicBlock(6, 6, 1), BasicBlock(6, 6, 1))
        self.layer2 = BasicBlock(6, 10, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(10, 4)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Separable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, 2, 1)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point = nn.Conv2d(6, 9, 1)
        self.norm = nn.GroupNorm(1, 9)
        self.fc = nn.Linear(9, 4)

    def forward(self, x):
        x = F.hardswish(self.point(F.relu6(self.depth(self.stem(x)))))
        return self.fc(self.norm(x).mean([2, 3]))


class SqueezeExcite(nn.Module):
    """With linear layers, as the paper's authors wrote it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Linear(8, 3, bias=False), nn.ReLU(), nn.Linear(3, 8, bias=False), nn.Sigmoid())
        self.fc = nn.Linear(8 * 36, 4)

    def forward(self, x):
        x = self.conv(x)
        b, c, _, _ = x.size()
        y = self.gate(self.pool(x).view(b, c)).view(b, c, 1, 1)
        return self.fc((x * y).flatten(1))


class SqueezeExciteConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 4)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x):
        x = self.conv(x)
        y = F.hardsigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.fc((y * x).mean((2, 3)))


class Recurrent(nn.Module):
    """As tutorials write it, with first states of zeros."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 7, num_layers=2, batch_first=True, dropout=0.2)
        self.fc = nn.Linear(7, 4)

    def forward(self, x):
        h0 = torch.zeros(2, x.size(0), 7).to(x.device)
        c0 = torch.zeros(2, x.size(0), 7).to(x.device)
        out, _ = self.lstm(x, (h0, c0))
        return self.fc(out[:, -1, :])


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.fc = nn.GRU(3, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        _, h = self.gru(x)
        return self.fc(h.squeeze(0))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.fc = nn.Embedding(13, 5), nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        _, (h, _) = self.lstm(self.embed(x.long()))
        return self.fc(h[-1])


class Attention(nn.Module):
    """One block of a transformer's encoder, norm behind the sums."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attn = nn.MultiheadAttention(8, 4, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down, self.fc = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x)
        x = self.norm1(x + self.attn(x, x, x, need_weights=False)[0])
        x = self.norm2(x + self.down(F.gelu(self.up(x))))
        return self.fc(x.mean(dim=1))


class Wave(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(6, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(8, 8, 3, padding="same", groups=8), nn.Conv1d(8, 10, 1), nn.Tanh(), nn.AvgPool1d(2),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(10, 4),
        )  # fmt: skip

    def forward(self, x):
        return self.body(x)


class Inception(nn.Module):
    """Branches side by side, read by a norm, an activation, a pool and a convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(2, 3, 5, padding=2)
        self.bn, self.mix, self.fc = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1), nn.Linear(6 * 9 + 12 * 9, 4)

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x), self.c(x)], 1)
        y = F.max_pool2d(F.relu(self.bn(y)), 2)
        z = torch.cat((self.mix(y), y), dim=1)
        return self.fc(z.flatten(1))


class ResNeXt(nn.Module):
    """A block of Xie et al. (CVPR 2017), its middle in four groups, between norms of three and of two groups."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 12, 3, padding=1), nn.GroupNorm(3, 12)
        self.reduce, self.norm1 = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.middle, self.norm2 = nn.Conv2d(8, 16, 3, padding=1, groups=4), nn.GroupNorm(4, 16)
        self.widen, self.norm3 = nn.Conv2d(16, 12, 1), nn.GroupNorm(6, 12)
        self.fc = nn.Linear(12 * 9, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.norm1(self.reduce(x)))
        y = F.relu(self.norm2(self.middle(y)))
        x = F.relu(x + self.norm3(self.widen(y)))
        return self.fc(F.max_pool2d(x, 2).flatten(1))


class ShuffleUnit(nn.Module):
    """A unit of ShuffleNet (Zhang et al., CVPR 2018, figure 2), with its shuffle of channels or without."""

    def __init__(self, shuffles=False):
        super().__init__()
        self.shuffles = shuffles
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.first, self.norm1 = nn.Conv2d(12, 6, 1, groups=3), nn.BatchNorm2d(6)
        self.each, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        self.second, self.norm3 = nn.Conv2d(6, 12, 1, groups=3, bias=False), nn.BatchNorm2d(12)
        self.mix, self.fc = nn.Conv2d(12, 5, 1), nn.Linear(5, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.norm1(self.first(x)))
        if self.shuffles:
            y = y.view(y.size(0), 3, 2, 6, 6).transpose(1, 2).reshape(y.size(0), 6, 6, 6)
        y = self.norm3(self.second(self.norm2(self.each(y))))
        return self.fc(F.relu(self.mix(F.relu(x + y))).mean((2, 3)))


MODELS = {
    "lenet-5": (LeNet5, (1, 28, 28)),
    "vgg": (VGGBlock, (3, 8, 8)),
    "resnet": (ResNet, (3, 8, 8)),
    "separable": (Separable, (1, 8, 8)),
    "squeeze-excite": (SqueezeExcite, (1, 6, 6)),
    "squeeze-excite-conv": (SqueezeExciteConv, (1, 6, 6)),
    "lstm": (Recurrent, (5, 3)),
    "gru": (Gated, (5, 3)),
    "words": (Words, (6,)),
    "attention": (Attention, (5, 3)),
    "wave": (Wave, (6, 16)),
    "inception": (Inception, (2, 6, 6)),
    "resnext": (ResNeXt, (2, 6, 6)),
    "shuffle-unit": (ShuffleUnit, (1, 6, 6)),
}
"""Name to (class, shape of one sample)."""
