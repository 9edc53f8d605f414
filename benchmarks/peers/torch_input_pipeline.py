"""The peer of ``benchmarks.input_pipeline``: PyTorch's DataLoader over torchvision.

Importing this file needs PyTorch, which the library itself never does.
"""

import importlib.metadata
from collections.abc import Iterator

import torch
import torchvision
from torchvision import transforms


def versions() -> dict[str, str]:
    """Returns the relevant versions."""
    return {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}


def batches(
    folder: str, job: str, batch_size: int, workers: int
) -> Iterator[torch.Tensor]:
    """Yields batches of uint8 images, read like in PyTorch's own ImageNet example.

    Args:
      folder: Folder of class folders.
      job: ``"train"``, which does not end, or ``"test"``.
      batch_size: Number of images in a batch.
      workers: Number of processes that decode.
    """
    if job == "train":
        steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    else:
        steps = [transforms.Resize(256), transforms.CenterCrop(224)]
    steps.append(transforms.PILToTensor())
    data = torchvision.datasets.ImageFolder(folder, transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(
        data,
        batch_size,
        shuffle=job == "train",
        drop_last=job == "train",
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        for images, _ in loader:
            yield images
        if job == "test":
            return
