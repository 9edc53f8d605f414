"""ResNet-50 on ImageNet: the paper's Table 2; its rows are selected after a colon.

| row    | ratios of conv1 and conv2, stages 1 to 4 | fewer FLOPs | parameters | top-1 |
|--------|------------------------------------------|-------------|------------|-------|
| dense  |                                          |             | 25.557 M   | 76.13 |
| `1.49` | 0.30, 0.30, 0.30, 0.14                   | 1.489×      | 19.637 M   | 76.44 |
| `2.31` | 0.60, 0.60, 0.60, 0.21 (the default)     | 2.308×      | 15.934 M   | 75.60 |
| `2.56` | 0.74, 0.74, 0.60, 0.21                   | 2.564×      | 15.788 M   | 75.12 |
| `3.06` | 0.68, 0.68, 0.68, 0.50                   | 3.063×      | 11.081 M   | 74.51 |

Top-1 accuracies are those of the paper, which used four V100 of 16 GB; FLOPs and
parameters are counted here. This config has not been run here: neither the accuracy nor
the time is known.

    python launch.py --config=configs/imagenet_resnet50_tpp.py:2.31 \\
        --workdir=runs/resnet50 --config.data.dir=$TFDS

It starts from torchvision's IMAGENET1K_V1 weights, read from the file
resnet50-0676ba61.pth in the current folder (or from --config.init.torch). Images in
class folders, in train/ and val/ of a folder, are read with --config.data.name=folder
--config.data.dir=<that folder>. --mode=inspect --config.init.torch='' shows what would
be pruned, without data and weights.
"""

import ml_collections

from tpp_jax.errors import TPPError
from tpp_jax.experiment.config import default_config

RATIOS = {
    "1.49": "*layer[1-3]*.conv[12]:0.3,*layer4*.conv[12]:0.14",
    "2.31": "*layer[1-3]*.conv[12]:0.6,*layer4*.conv[12]:0.21",
    "2.56": "*layer[12]*.conv[12]:0.74,*layer3*.conv[12]:0.6,*layer4*.conv[12]:0.21",
    "3.06": "*layer[1-3]*.conv[12]:0.68,*layer4*.conv[12]:0.5",
}


def get_config(row: str = "2.31") -> ml_collections.ConfigDict:
    if row not in RATIOS:
        raise TPPError(
            f"imagenet_resnet50_tpp.py has no row {row!r}: choose one of "
            f"{', '.join(RATIOS)}, as in imagenet_resnet50_tpp.py:2.31"
        )
    config = default_config()
    config.model.name = "resnet50"
    config.data.name = "imagenet2012"
    config.data.batch_size = 256
    config.init.torch = "resnet50-0676ba61.pth"
    config.eval_every = 5004  # once an epoch
    config.checkpoint_every = 2500

    config.prune.ratios = RATIOS[row]
    config.prune.learning_rate = 1e-3
    config.prune.weight_decay = 1e-4
    config.prune.schedule.granularity = 1e-4
    config.prune.schedule.every = 5
    config.prune.schedule.stabilize = 40_000

    config.finetune.epochs = 90
    config.finetune.learning_rate = "0:0.01,30:0.001,60:0.0001,75:0.00001"
    config.finetune.weight_decay = 1e-4
    return config
