"""ResNet-56 on CIFAR-10: ablations of TPP.

python launch.py --mode=sweep --config=configs/tables/ablations.py \\
        --workdir=runs/ablations --config.base.data.dir=$TFDS
"""

import ml_collections

from configs import cifar10_resnet56_tpp
from configs.tables.methods import GREG_1, ratios
from tpp_jax.commands.sweep import default_table


def get_config() -> ml_collections.ConfigDict:
    table = default_table()
    table.title = "ResNet-56 on CIFAR-10: parts of TPP"
    table.base = cifar10_resnet56_tpp.get_config()
    table.base.eval_every = 390  # once an epoch
    table.metrics = ("best_accuracy", "last_accuracy", "cut_accuracy")
    table.rows = (
        ("TPP", {}),
        ("no Gram", {"prune": {"gram_weight": 0.0}}),
        ("no batch norm", {"prune": {"bn": False}}),
        ("no L2", {"prune": {"l2": False}}),
        ("neither Gram nor batch norm", GREG_1),
        ("pruned filters orthonormal", {"prune": {"target": "orthogonal"}}),
        ("kept filters orthonormal too", {"prune": {"kept_weight": 0.1}}),
    )
    table.columns = ratios("*layer*.conv1", "0.5", "0.9", "0.95")
    return table
