"""VGG-19 on CIFAR-100, as in the paper: all convolutions but the first are pruned.

Reference: dense 74.02 %; at ratios 0.1, 0.3, 0.5, 0.7 (1.23, 1.97, 3.61, 8.89 times
fewer FLOPs) plain L1 pruning gets 74.01, 73.01, 71.49, 66.05 %, GReg-2 67.75 % at 0.7.

    python launch.py --config=configs/cifar100_vgg19_tpp.py --workdir=runs/vgg19 \\
        --config.data.dir=$TFDS
"""

import ml_collections

from tpp_jax.experiment.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "cifar_vgg19"
    config.data.name = "cifar100"
    config.data.batch_size = 256
    config.data.crop_padding = 4
    config.data.flip = True

    config.pretrain.epochs = 200
    config.pretrain.learning_rate = "0:0.1,100:0.01,150:0.001"

    config.prune.ratios = "*features*:0.7"
    config.prune.skip = "features.0"
    config.prune.schedule.granularity = 1e-4
    config.prune.schedule.every = 10
    config.prune.schedule.stabilize = 10_000

    config.finetune.epochs = 120
    config.finetune.learning_rate = "0:0.01,60:0.001,90:0.0001"
    return config
