"""ResNet-8 on scikit-learn's digits: a complete table without a download, on a CPU.

A small substitute for Table 1. It shows that all methods run and can be compared, but
hardly which one is better on real tasks. It takes some half an hour on two cores.

    python launch.py --mode=sweep --config=configs/tables/digits.py --workdir=runs/table
"""

import ml_collections

from configs import digits_resnet8_tpp
from configs.tables.methods import ratios, rivals
from tpp_jax.commands.sweep import default_table


def get_config() -> ml_collections.ConfigDict:
    table = default_table()
    table.title = "ResNet-8 on digits"
    table.base = digits_resnet8_tpp.get_config()
    table.base.eval_every = 110  # every fifth epoch
    # Measured at the end of each phase and after the cut only.
    table.base.jacobian_every = 10**9
    table.base.prune.grow.granularity = 5e-4
    table.base.prune.grow.every = 5
    table.base.prune.grow.ceiling = 0.05
    table.metrics = ("best_accuracy", "last_accuracy", "cut_accuracy", "jsv_mean")
    table.rows = rivals(table.base)
    table.columns = ratios("*layer*.conv1", "0.5", "0.9")
    return table
