"""The peer of ``benchmarks.step``: the same training steps, written in PyTorch.

The data are on the device as uint8. A step crops, flips and normalises the images
there, differentiates and updates by SGD. The penalized step adds TPP's penalties like
the original: the Gram gradient by autograd, the growing L2 on kernels and batch norms
by hand. Importing this file needs PyTorch, which the library itself never does.
"""

import contextlib
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class _Block(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.pad = planes // 4 if stride != 1 else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """He et al.'s network of 6n + 2 layers for CIFAR, with option-A shortcuts."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        n = (depth - 2) // 6
        for stage, planes in enumerate((16, 32, 64), 1):
            before = max(planes // 2, 16)
            first = _Block(before, planes, 1 if stage == 1 else 2)
            rest = [_Block(planes, planes, 1) for _ in range(n - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class CifarVGG(nn.Module):
    """VGG for CIFAR: convolutions with batch norm, an average, one dense layer."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        counts = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}[depth]
        layers: list[nn.Module] = []
        before = 3
        for i, (planes, count) in enumerate(
            zip((64, 128, 256, 512, 512), counts, strict=True)
        ):
            if i:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [
                    nn.Conv2d(before, planes, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(planes),
                    nn.ReLU(),
                ]
                before = planes
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def _create(name: str) -> nn.Module:
    if name.startswith("cifar_resnet"):
        return CifarResNet(int(name.removeprefix("cifar_resnet")))
    if name.startswith("cifar_vgg"):
        return CifarVGG(int(name.removeprefix("cifar_vgg")))
    import torchvision  # only for its networks

    return torchvision.models.get_model(name, weights=None)


class Peer:
    """A training step of one network, with its state.

    Args:
      name: Name of the network in ``tpp_jax.models``.
      pixels: Images, uint8 ``[n, h, w, 3]``.
      labels: Labels, int ``[n]``.
      batch_size: Number of images in a step.
      pruned: Filters that TPP prunes, by name of the layer; empty for a plain step.
      compiled: Whether to use ``torch.compile``.
      half: Whether to compute in bfloat16, by autocast.
    """

    def __init__(
        self,
        name: str,
        pixels: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        pruned: dict[str, np.ndarray],
        *,
        compiled: bool = False,
        half: bool = False,
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # TF32, as XLA multiplies on such GPUs; nothing of the kind exists on CPUs.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(0)
        network = _create(name).to(self._device, memory_format=torch.channels_last)
        self._network = network.train()
        self._call = torch.compile(network) if compiled else network
        self._optimizer = torch.optim.SGD(
            network.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4
        )
        self._pixels = torch.as_tensor(pixels, device=self._device)
        self._labels = torch.as_tensor(labels, device=self._device).long()
        self._batch_size, self._half = batch_size, half
        norms = _norms_after(network)
        self._penalized = [
            (layer, norms.get(name), self._mask(pruned[name], layer))
            for name, layer in network.named_modules()
            if name in pruned
        ]
        scale = torch.tensor((0.229, 0.224, 0.225), device=self._device)
        self._mean = torch.tensor((0.485, 0.456, 0.406), device=self._device)
        self._std = scale

    def _mask(self, pruned: np.ndarray, layer: nn.Module) -> torch.Tensor:
        mask = torch.zeros(len(layer.weight), device=self._device)
        mask[torch.as_tensor(pruned, device=self._device).long()] = 1
        return mask

    def step(self) -> None:
        """Starts one step; on a GPU it may not be finished when this returns."""
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=self._half)
        x, labels = self._batch()
        with autocast:
            loss = F.cross_entropy(self._call(x).float(), labels)
        for layer, _, mask in self._penalized:
            weight = layer.weight.flatten(1)
            touched = 1 - torch.outer(1 - mask, 1 - mask)
            gram = weight @ weight.T * touched
            loss = loss + 1000.0 * 0.5 * gram.square().sum() / math.prod(gram.shape)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            for layer, norm, mask in self._penalized:
                across = (-1, *[1] * (layer.weight.ndim - 1))
                layer.weight.grad += 0.5 * mask.view(across) * layer.weight
                for part in () if norm is None else (norm.weight, norm.bias):
                    part.grad += 0.5 * mask * part
        self._optimizer.step()

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        n, size = self._batch_size, self._pixels.shape[1]
        chosen = torch.randint(len(self._pixels), (n,), device=self._device)
        x = F.pad(self._pixels[chosen], (0, 0, 4, 4, 4, 4))
        top, left = (torch.randint(9, (n,), device=self._device) for _ in range(2))
        grid = torch.arange(size, device=self._device)
        columns = torch.where(
            torch.rand(n, 1, device=self._device) < 0.5, grid, size - 1 - grid
        )
        rows = (top[:, None] + grid)[:, :, None]
        columns = (left[:, None] + columns)[:, None, :]
        x = x[torch.arange(n, device=self._device)[:, None, None], rows, columns]
        x = (x.float() / 255 - self._mean) / self._std
        return x.permute(0, 3, 1, 2), self._labels[chosen]

    def wait(self) -> None:
        """Waits until the device has finished all steps."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _norms_after(network: nn.Module) -> dict[str, nn.Module]:
    """Returns the batch norm that is registered after each layer, by name."""
    found: dict[str, nn.Module] = {}
    before = ""
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            found.setdefault(before, module)
        if isinstance(module, nn.Conv2d | nn.Linear):
            before = name
    return found


def describe() -> dict[str, str]:
    """Returns the relevant versions and settings."""
    found = {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
    with contextlib.suppress(Exception):
        found["device"] = torch.cuda.get_device_name()
    return found
