"""Networks of docs/quantise.md and the rows of its tables."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import tpp_jax as tpp
from benchmarks.recovery_digits import digits, trained

SEEDS = 5
SHARE = 0.5  # of the channels of each group are removed
CALLS = 20


def networks() -> Iterator[tuple[str, Any]]:
    """Yields a dense and a pruned ResNet-8 for each seed, with folded norms."""
    images, labels, *_ = digits()
    for seed in range(SEEDS):
        dense = trained(images, labels, seed=seed)
        yield "dense", tpp.fold_norms(dense, images[:1])
        yield "pruned", _pruned(dense, images)


def _pruned(model: Any, images: Any) -> Any:
    """Returns a model without half of its channels, refit on 512 images, and folded."""
    batches = [images[start : start + 128] for start in range(0, 512, 128)]
    groups = tpp.channel_groups(model, images[:1])
    moments = tpp.input_moments(model, batches)
    plan = tpp.make_plan(groups, model, SHARE, criterion="obs", statistics=moments)
    small = tpp.compensate(model, plan, batches, moments=moments)
    small = tpp.recalibrate(small, batches, like=model, plan=plan)
    return tpp.fold_norms(small, images[:1])


class Rows:
    """Accuracy, size and time of networks, by name, one entry for each seed."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, list[float]]] = {}
        self.labels = np.asarray(digits()[3])

    def note(self, name: str, run: Callable[[], Any], size: int) -> None:
        """Measures a network.

        Args:
          name: Name of the row.
          run: Function that returns the logits of the test images.
          size: Number of bytes.
        """
        right = np.argmax(np.asarray(run()), -1) == self.labels
        row = self.rows.setdefault(name, {"accuracy": [], "bytes": [], "seconds": []})
        row["accuracy"].append(round(100 * float(right.mean()), 2))
        row["bytes"].append(size)
        row["seconds"].append(_seconds(run))
        print(name, {key: values[-1] for key, values in row.items()}, flush=True)

    def summary(self) -> dict[str, Any]:
        """Returns the means of the accuracies, and the shortest times."""
        return {
            name: {
                "accuracy": round(float(np.mean(row["accuracy"])), 1),
                "accuracy_of_seeds": row["accuracy"],
                "bytes": row["bytes"][0],
                "milliseconds_for_360_images": round(1e3 * min(row["seconds"]), 2),
            }
            for name, row in self.rows.items()
        }


def size_of(tree: Any) -> int:
    """Returns the number of bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _seconds(run: Callable[[], Any]) -> float:
    """Returns the least processor time of a call."""
    found = []
    for _ in range(CALLS):
        started = time.process_time()
        jax.block_until_ready(run())
        found.append(time.process_time() - started)
    return min(found)
