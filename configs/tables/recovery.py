"""ResNet-8 on digits: cuts that keep the function, and what they are a start for.

One-shot pruning with and without a refit of the layers behind the cut, fine-tuned and
trained for as many steps as TPP, and with the dense network as a teacher. The second
column fine-tunes for 2 epochs instead of 20. It takes half an hour on two cores.

    python launch.py --mode=sweep --config=configs/tables/recovery.py \\
        --workdir=runs/recovery
"""

import ml_collections

from configs.tables import digits
from configs.tables.methods import recovery


def get_config() -> ml_collections.ConfigDict:
    table = digits.get_config()
    table.title = "ResNet-8 on digits: cuts that keep the function"
    table.base.jacobian_every = 0
    table.metrics = ("cut_accuracy", "best_accuracy", "last_accuracy")
    table.rows = recovery()
    ratio = {"prune": {"ratios": "*layer*.conv1:0.9"}}
    short = {"finetune": {"epochs": 2, "warmup_epochs": 0.2}}
    table.columns = (("0.9", ratio), ("0.9, 2 epochs", {**ratio, **short}))
    return table
