"""ResNet-50 on ImageNet: Table 2 of the paper.

python launch.py --mode=sweep --config=configs/tables/imagenet.py \\
        --workdir=runs/t2 --config.base.data.dir=$TFDS
"""

import ml_collections

from configs import imagenet_resnet50_tpp
from configs.tables.methods import GREG_1, published
from tpp_jax.commands.sweep import default_table

_SPEEDUPS = tuple(imagenet_resnet50_tpp.RATIOS)


def get_config() -> ml_collections.ConfigDict:
    table = default_table()
    table.title = "ResNet-50 on ImageNet, by speedup"
    table.base = imagenet_resnet50_tpp.get_config()
    table.seeds = (0,)
    table.rows = (
        ("L1", {"prune": {"method": "oneshot"}}),
        ("L1, equal epochs", {"prune": {"method": "extra"}}),
        ("GReg-1", GREG_1),
        ("GReg-2", {"prune": {"method": "greg2"}}),
        ("TPP", {}),
    )
    table.columns = tuple(
        (speedup, {"prune": {"ratios": ratios}})
        for speedup, ratios in imagenet_resnet50_tpp.RATIOS.items()
    )
    table.paper = (
        *published("L1", _SPEEDUPS, (None, 75.24, 74.77, None)),
        *published("GReg-2", _SPEEDUPS, (None, 75.36, 74.93, 73.90)),
        *published("TPP", _SPEEDUPS, (76.44, 75.60, 75.12, 74.51)),
    )
    return table
