"""ResNet-8 on scikit-learn's handwritten digits: the complete method, in minutes.

The default config, which needs no download. It prunes half of the filters of the first
convolution of every block.

    python launch.py --config=configs/digits_resnet8_tpp.py --workdir=runs/digits
"""

import ml_collections

from tpp_jax.experiment.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "cifar_resnet8"
    config.data.name = "digits"
    config.data.batch_size = 64
    config.data.crop_padding = 1
    config.data.flip = False
    config.log_every = 20
    config.eval_every = 200
    config.checkpoint_every = 200

    config.pretrain.epochs = 20
    config.pretrain.schedule = "cosine"
    config.pretrain.warmup_epochs = 2.0
    config.pretrain.learning_rate = "0.1"

    config.prune.ratios = "*layer*.conv1:0.5"
    config.prune.schedule.granularity = 0.005
    config.prune.schedule.every = 5
    config.prune.schedule.stabilize = 200
    config.prune.schedule.zero_out_every = 10

    config.finetune.epochs = 20
    config.finetune.schedule = "cosine"
    config.finetune.warmup_epochs = 2.0
    config.finetune.learning_rate = "0.02"
    return config
