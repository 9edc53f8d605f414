"""The peer of ``benchmarks.graph``: Torch-Pruning on torchvision's networks.

Importing this file needs PyTorch, which the library itself never does.
"""

import copy
import importlib.metadata
import warnings

import torch
import torch_pruning
import torchvision


def versions() -> dict[str, str]:
    """Returns the relevant versions and the number of threads."""
    packages = ("torch", "torchvision", "torch-pruning")
    found = {name: importlib.metadata.version(name) for name in packages}
    return found | {"torch threads": str(torch.get_num_threads())}


class Peer:
    """One network with random weights, and the two jobs that are timed.

    Args:
      name: Name in torchvision.
      side: Height and width of the images.
    """

    def __init__(self, name: str, side: int) -> None:
        # It warns of parameters that belong to no layer, and treats them correctly.
        warnings.filterwarnings("ignore", module="torch_pruning")
        self._model = torchvision.models.get_model(name, weights=None).eval()
        self._images = torch.ones(1, 3, side, side)

    def copy(self) -> torch.nn.Module:
        """Returns a copy of the network, since pruning changes it in place."""
        return copy.deepcopy(self._model)

    def groups(self, model: torch.nn.Module) -> int:
        """Builds the dependency graph and returns its number of groups."""
        graph = torch_pruning.DependencyGraph()
        graph.build_dependency(model, example_inputs=self._images)
        return len(list(graph.get_all_groups()))

    def prune(self, model: torch.nn.Module, ratio: float) -> int:
        """Prunes all groups but the logits by L1; returns the number of parameters."""
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        pruner = torch_pruning.pruner.MetaPruner(
            model,
            self._images,
            importance=torch_pruning.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio,
            ignored_layers=layers[-1:],
        )
        pruner.step()
        return sum(parameter.numel() for parameter in model.parameters())
