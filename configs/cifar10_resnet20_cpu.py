"""ResNet-20 on CIFAR-10 with a very short schedule: an hour on two CPU cores.

The run shows the method on real photographs. It is not the paper's experiment, which is
cifar10_resnet56_tpp.py (78,000 dense steps instead of 3,124, for example). The recorded
result is in docs/results.md.

    python launch.py --config=configs/cifar10_resnet20_cpu.py --workdir=runs/resnet20 \\
        --config.data.dir=$TFDS
"""

import ml_collections

from tpp_jax.experiment.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "cifar_resnet20"
    config.data.name = "cifar10"
    config.data.batch_size = 64
    config.log_every = 20
    config.eval_every = 781
    config.checkpoint_every = 400

    config.pretrain.epochs = 4
    config.pretrain.schedule = "cosine"
    config.pretrain.warmup_epochs = 0.4
    config.pretrain.learning_rate = "0.1"

    config.prune.ratios = "*layer*.conv1:0.7"
    config.prune.schedule.granularity = 0.00625
    config.prune.schedule.every = 5
    config.prune.schedule.stabilize = 200
    config.prune.schedule.zero_out_every = 10

    config.finetune.epochs = 1
    config.finetune.schedule = "cosine"
    config.finetune.warmup_epochs = 0.1
    config.finetune.learning_rate = "0.02"
    return config
