"""The same network in PyTorch, as PyTorch's users write it: what minires is compared with, in tests and in speed."""

import torch.nn.functional as F  # noqa: N812
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, in_channels, out_channels, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential() if shortcut else None
        if shortcut and (stride != 1 or in_channels != out_channels):
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out if self.shortcut is None else out + self.shortcut(x))


class TorchResNet(nn.Module):
    def __init__(self, blocks=(2, 1, 1, 1), channels=(64, 128, 256, 512), num_classes=10, dropout=0.5, shortcut=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        in_channels = channels[0]
        for i, (count, out_channels) in enumerate(zip(blocks, channels, strict=True)):
            stage = []
            for j in range(count):
                stage.append(BasicBlock(in_channels, out_channels, 2 if i and not j else 1, shortcut))
                in_channels = out_channels
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.num_stages = len(blocks)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(self.num_stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.linear(self.dropout(x.mean((2, 3))))
