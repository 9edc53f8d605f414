"""VGG-19 on CIFAR-100: the method and its rivals over four ratios.

python launch.py --mode=sweep --config=configs/tables/vgg19_cifar100.py \\
        --workdir=runs/vgg19 --config.base.data.dir=$TFDS
"""

import ml_collections

from configs import cifar100_vgg19_tpp
from configs.tables.methods import published, ratios, rivals
from tpp_jax.commands.sweep import default_table

_RATIOS = "0.1", "0.3", "0.5", "0.7"


def get_config() -> ml_collections.ConfigDict:
    table = default_table()
    table.title = "VGG-19 on CIFAR-100"
    table.base = cifar100_vgg19_tpp.get_config()
    table.base.eval_every = 195  # once an epoch
    table.rows = rivals(table.base)
    table.columns = ratios("*features*", *_RATIOS)
    table.paper = (
        *published("Scratch", _RATIOS, (72.84, 71.88, 70.79, 66.52)),
        *published("L1", _RATIOS, (74.01, 73.01, 71.49, 66.05)),
        # At 8.84 times fewer FLOPs; the ratio 0.7 gives 8.89.
        *published("GReg-1", _RATIOS, (None, None, None, 67.55)),
        *published("GReg-2", _RATIOS, (None, None, None, 67.75)),
    )
    return table
