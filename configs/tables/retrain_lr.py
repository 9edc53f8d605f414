"""ResNet-56 on CIFAR-10: the effect of the learning rate of fine-tuning.

A network that is hard to train needs a large learning rate; the claim of TPP is that
its networks do not.

    python launch.py --mode=sweep --config=configs/tables/retrain_lr.py \\
        --workdir=runs/lr --config.base.data.dir=$TFDS
"""

import ml_collections

from configs import cifar10_resnet56_tpp
from configs.tables.methods import published, ratios
from tpp_jax.commands.sweep import default_table

_RATIOS = "0.3", "0.5", "0.7", "0.9", "0.95"
_SMALL = {"learning_rate": "0:0.001,60:0.0001,90:0.00001"}


def get_config() -> ml_collections.ConfigDict:
    table = default_table()
    table.title = "ResNet-56 on CIFAR-10: the learning rate of the retraining"
    table.base = cifar10_resnet56_tpp.get_config()
    table.base.eval_every = 390  # once an epoch
    table.metrics = ("best_accuracy", "last_accuracy", "trainability_accuracy")
    oneshot = {"prune": {"method": "oneshot"}}
    table.rows = (
        ("L1, LR 1e-2", oneshot),
        ("L1, LR 1e-3", {**oneshot, "finetune": _SMALL}),
        ("TPP, LR 1e-2", {}),
        ("TPP, LR 1e-3", {"finetune": _SMALL}),
    )
    table.columns = ratios("*layer*.conv1", *_RATIOS)
    table.paper = (
        *published("L1, LR 1e-2", _RATIOS, (93.79, 93.51, 92.26, 86.75, 83.03)),
        *published("L1, LR 1e-3", _RATIOS, (93.43, 93.12, 91.77, 87.57, 83.10)),
        *published("TPP, LR 1e-2", _RATIOS, (93.81, 93.46, 92.35, 89.63, 85.86)),
        *published("TPP, LR 1e-3", _RATIOS, (93.54, 93.32, 92.00, 89.09, 85.47)),
    )
    return table
