"""ResNet-8 on CIFAR-10, a short schedule: the main rows of Table 1, on a CPU.

This is not the paper's experiment, which is table1.py: 8 epochs of dense training
instead of 200, 3 of fine-tuning instead of 120, 1,300 steps of regularization instead
of 110,000, at ten times the paper's learning rate. It takes two hours on two cores.

    python launch.py --mode=sweep --config=configs/tables/table1_cpu.py \\
        --workdir=runs/t1 --config.base.data.dir=$TFDS
"""

import ml_collections

from configs import cifar10_resnet20_cpu
from configs.tables.methods import ratios, rivals
from tpp_jax.commands.sweep import default_table

_ROWS = "Scratch", "L1", "L1, equal epochs", "TPP"


def get_config() -> ml_collections.ConfigDict:
    table = default_table()
    table.title = "ResNet-8 on CIFAR-10, shortened"
    base = cifar10_resnet20_cpu.get_config()
    base.model.name = "cifar_resnet8"
    base.data.batch_size = 128
    base.eval_every = 390  # once an epoch
    base.checkpoint_every = 390
    base.pretrain.epochs = 8
    base.prune.learning_rate = 1e-2
    base.prune.schedule.granularity = 0.01
    base.prune.schedule.every = 10
    base.prune.schedule.stabilize = 300
    base.finetune.epochs = 3
    table.base = base
    table.metrics = ("best_accuracy", "last_accuracy", "cut_accuracy")
    table.rows = tuple(row for row in rivals(base) if row[0] in _ROWS)
    table.columns = ratios("*layer*.conv1", "0.9", "0.95")
    return table
