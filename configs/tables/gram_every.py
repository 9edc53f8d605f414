"""ResNet-8 on scikit-learn's digits: the Gram penalty of every step or of some.

The gradient of the penalty is as many times as large as the steps between. A quarter of
an hour on two cores, no download.

    python launch.py --mode=sweep --config=configs/tables/gram_every.py \\
        --workdir=runs/gram_every
"""

import ml_collections

from configs.tables import digits
from configs.tables.methods import ratios


def get_config() -> ml_collections.ConfigDict:
    table = digits.get_config()
    table.title = "ResNet-8 on digits: steps from one Gram penalty to the next"
    table.metrics = ("last_accuracy", "cut_accuracy")
    table.rows = (
        *((f"every {k}", {"prune": {"gram_every": k}}) for k in (1, 2, 4, 8)),
        ("none", {"prune": {"gram_weight": 0.0}}),
    )
    table.columns = ratios("*layer*.conv1", "0.5", "0.9", "0.95")
    return table
