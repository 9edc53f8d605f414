"""ResNet-56 on CIFAR-10: Table 1 of the paper, column 0.9 (set the ratio for others).

Expected test accuracy, from the paper: 93.78 % dense; pruned by TPP at ratio 0.3, 0.5,
0.7, 0.9, 0.95: 93.81, 93.46, 92.35, 89.63, 85.86 %, at 1.45, 1.99, 3.59, 11.6, 19.8
times fewer FLOPs (means of three runs, best epoch on the test set). 78,000 steps of
dense training, 110,001 of regularizing and stabilizing, 46,800 of fine-tuning.

    python launch.py --config=configs/cifar10_resnet56_tpp.py --workdir=runs/resnet56 \\
        --config.data.dir=$TFDS --config.prune.ratios='*layer*.conv1:0.9'

CIFAR-10 is read through tensorflow-datasets; if it is missing, the error message says
how to prepare it. SVHN has images of the same shape: --config.data.name=svhn_cropped
--config.data.flip=False
"""

import ml_collections

from tpp_jax.experiment.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "cifar_resnet56"
    config.data.name = "cifar10"
    config.data.batch_size = 128
    config.data.crop_padding = 4
    config.data.flip = True
    config.eval_every = 2000
    config.checkpoint_every = 2000

    config.pretrain.epochs = 200
    config.pretrain.learning_rate = "0:0.1,100:0.01,150:0.001"
    config.pretrain.weight_decay = 5e-4

    config.prune.ratios = "*layer*.conv1:0.9"
    config.prune.learning_rate = 1e-3
    config.prune.weight_decay = 5e-4
    config.prune.gram_weight = 1000.0
    config.prune.schedule.granularity = 1e-4
    config.prune.schedule.every = 10
    config.prune.schedule.stabilize = 10_000
    config.prune.schedule.zero_out_every = 100

    config.finetune.epochs = 120
    config.finetune.learning_rate = "0:0.01,60:0.001,90:0.0001"
    config.finetune.weight_decay = 5e-4
    return config
