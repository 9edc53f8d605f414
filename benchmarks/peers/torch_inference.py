"""The peer of ``benchmarks.runtimes``: the same networks, dense and pruned, in PyTorch.

Importing this file needs PyTorch, which the library itself never does.
"""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from benchmarks.peers.torch_step import CifarResNet

Call = Callable[[], np.ndarray]


def image_network(name: str, weights: pathlib.Path) -> nn.Module:
    """Returns a network with weights that ``tpp.save_torch`` wrote, pruned or not.

    Args:
      name: Name of the network in ``tpp_jax.models``.
      weights: File of safetensors.
    """
    if name.startswith("cifar_resnet"):
        network: nn.Module = CifarResNet(int(name.removeprefix("cifar_resnet")))
    else:
        import torchvision  # only for its networks

        network = torchvision.models.get_model(name, weights=None, num_classes=10)
    tensors = safetensors.torch.load_file(weights)
    _narrow(network, tensors)
    network.load_state_dict(tensors, strict=False)
    return network.eval().to(memory_format=torch.channels_last)


def _narrow(network: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Gives the layers of a network the sizes of its weights, in place."""
    for name, module in network.named_modules():
        weight = tensors.get(f"{name}.weight")
        if isinstance(module, nn.Conv2d) and weight is not None:
            depthwise = module.groups > 1
            module.out_channels = len(weight)
            module.groups = len(weight) if depthwise else 1
            module.in_channels = len(weight) if depthwise else weight.shape[1]
        if isinstance(module, nn.BatchNorm2d) and weight is not None:
            module.num_features = len(weight)
            module.running_mean = torch.zeros(len(weight))
            module.running_var = torch.ones(len(weight))
        for kind in ("weight", "bias"):
            if (own := tensors.get(f"{name}.{kind}")) is not None:
                setattr(module, kind, nn.Parameter(own.clone()))


def language_model(folder: pathlib.Path) -> nn.Module:
    """Returns a decoder that ``tpp.save_hf`` wrote."""
    import transformers  # only for its networks

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def call_of(network: nn.Module, inputs: np.ndarray, *, compiled: bool) -> Call:
    """Returns a function that runs a network.

    Args:
      network: Network.
      inputs: Images [b, h, w, c], or tokens [b, n].
      compiled: Whether to use ``torch.compile``.
    """
    tensor = torch.from_numpy(inputs)
    # The images are a view: their channels are last in memory.
    tensor = tensor.permute(0, 3, 1, 2) if inputs.ndim == 4 else tensor.long()
    run: Any = torch.compile(network) if compiled else network

    def call() -> np.ndarray:
        with torch.inference_mode():
            outputs = run(tensor)
            return getattr(outputs, "logits", outputs).numpy()

    return call


def describe() -> dict[str, str]:
    """Returns the versions."""
    found = {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
    with contextlib.suppress(ImportError):
        import transformers

        found["transformers"] = transformers.__version__
    return found
