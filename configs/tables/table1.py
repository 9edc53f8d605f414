"""ResNet-56 on CIFAR-10: Table 1 of the paper, and rows without published results.

--config.only='tpp_0.9_0' runs one cell. The table has not been run here: three seeds of
all cells are some 40 million steps.

    python launch.py --mode=sweep --config=configs/tables/table1.py --workdir=runs/t1 \\
        --config.base.data.dir=$TFDS
"""

import ml_collections

from configs import cifar10_resnet56_tpp
from configs.tables.methods import published, ratios, rivals
from tpp_jax.commands.sweep import default_table

_RATIOS = "0.3", "0.5", "0.7", "0.9", "0.95"


def get_config() -> ml_collections.ConfigDict:
    table = default_table()
    table.title = "ResNet-56 on CIFAR-10"
    table.base = cifar10_resnet56_tpp.get_config()
    table.base.eval_every = 390  # once an epoch
    table.metrics = ("best_accuracy", "last_accuracy", "trainability_accuracy")
    cosine = {"schedule": "cosine", "learning_rate": "0.01"}
    table.rows = (
        *rivals(table.base),
        ("L1, cosine", {"prune": {"method": "oneshot"}, "finetune": cosine}),
    )
    table.columns = ratios("*layer*.conv1", *_RATIOS)
    # Means over three runs, and their spread; the last row is from arXiv 2301.05219.
    table.paper = (
        *_of("Scratch", 93.16, 92.78, 92.11, 88.36, 84.60),
        *published(
            "L1",
            _RATIOS,
            (93.79, 93.51, 92.26, 86.75, 83.03),
            (0.06, 0.07, 0.17, 0.31, 0.07),
        ),
        *_of("L1 + OrthP", 93.69, 93.36, 91.96, 86.01, 82.62),
        *_of("L1 + KernOrth", 93.49, 93.30, 91.71, 84.78, 80.87),
        *_of("L1 + OrthConv", 92.54, 92.41, 91.02, 84.52, 80.23),
        *_of("KernOrth + L1", 93.49, 92.82, 90.54, 85.47, 79.48),
        *_of("OrthConv + L1", 93.63, 93.28, 92.27, 86.70, 83.21),
        *published(
            "TPP",
            _RATIOS,
            (93.81, 93.46, 92.35, 89.63, 85.86),
            (0.11, 0.06, 0.12, 0.10, 0.08),
        ),
        *_of("L1, cosine", 93.82, 93.74, 92.27, 86.90, None),
    )
    return table


def _of(row: str, *means: float | None) -> tuple:
    return published(row, _RATIOS, means)
