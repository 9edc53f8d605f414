"""ResNet-8 on CIFAR-10: cuts that keep the function on photographs, on a CPU.

The rows of recovery.py that need no steps but those of the fine-tuning, in a size for a
CPU: two epochs of dense training, one of fine-tuning, one seed. A quarter of an hour on
two idle cores.

    python launch.py --mode=sweep --config=configs/tables/recovery_cpu.py \\
        --workdir=runs/recovery_cpu --config.base.data.dir=$TFDS
"""

import ml_collections

from configs.tables import table1_cpu
from configs.tables.methods import ratios, recovery
from tpp_jax.commands.sweep import default_table

_FINETUNED = "L1", "L1, distilled", "Compensated", "Compensated, distilled"
_FINETUNED += "Compensated, wanda", "Compensated, obs"


def get_config() -> ml_collections.ConfigDict:
    table = default_table()
    table.title = "ResNet-8 on CIFAR-10, shortened: cuts that keep the function"
    table.base = table1_cpu.get_config().base
    table.base.pretrain.epochs = 2
    table.base.finetune.epochs = 1
    table.metrics = ("cut_accuracy", "best_accuracy", "last_accuracy")
    table.rows = tuple(row for row in recovery() if row[0] in _FINETUNED)
    table.columns = ratios("*layer*.conv1", "0.5")
    table.seeds = (0,)
    return table
