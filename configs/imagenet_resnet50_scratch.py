"""ResNet-50 on ImageNet from random weights: dense training, then the 2.31× row.

The dense network is trained with torchvision's original recipe (the defaults of its
reference script): 90 epochs of SGD with batches of 256, learning rate 0.1 ÷ 10 at 30
and 60, momentum 0.9, weight decay 1e-4. Torchvision's own weights of this recipe, from
which imagenet_resnet50_tpp.py starts, have 76.13 % top-1; from them the paper gets
75.60 % at 2.31×. This config has not been run here: neither the accuracy nor the time
is known. One difference is known: in the reference, batch norm takes the statistics of
the 32 images of one of eight GPUs; here it takes those of the full batch.

    python launch.py --config=configs/imagenet_resnet50_scratch.py \\
        --workdir=runs/resnet50_scratch --config.data.dir=$TFDS

Runs of the other rows can then start from the folder dense/ of the run:
--config=configs/imagenet_resnet50_tpp.py:3.06 --config.init.torch='' \\
--config.init.model=runs/resnet50_scratch/dense
"""

import ml_collections

from tpp_jax.experiment.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "resnet50"
    config.data.name = "imagenet2012"
    config.data.batch_size = 256
    config.eval_every = 5004  # once an epoch
    config.checkpoint_every = 2500

    config.pretrain.epochs = 90
    config.pretrain.learning_rate = "0:0.1,30:0.01,60:0.001"
    config.pretrain.weight_decay = 1e-4

    config.prune.ratios = "*layer[1-3]*.conv[12]:0.6,*layer4*.conv[12]:0.21"
    config.prune.learning_rate = 1e-3
    config.prune.weight_decay = 1e-4
    config.prune.schedule.granularity = 1e-4
    config.prune.schedule.every = 5
    config.prune.schedule.stabilize = 40_000

    config.finetune.epochs = 90
    config.finetune.learning_rate = "0:0.01,30:0.001,60:0.0001,75:0.00001"
    config.finetune.weight_decay = 1e-4
    return config
