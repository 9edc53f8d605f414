"""ResNet-34 on ImageNet: the row at 1.32× of the paper's Table 2.

The first convolutions of the blocks lose 0.5, 0.6 and 0.4 of their filters in stages 1
to 3; the last stage and the blocks 1.0, 2.0, 2.3, 3.0 and 3.5 are not pruned. This
gives 1.317× fewer FLOPs and 21.798 → 19.469 million parameters. Top-1 in the paper,
which used four V100 of 16 GB: 73.31 % dense, 73.77 % pruned. This config has not been
run here: neither the accuracy nor the time is known.

    python launch.py --config=configs/imagenet_resnet34_tpp.py \\
        --workdir=runs/resnet34 --config.data.dir=$TFDS

It starts from torchvision's IMAGENET1K_V1 weights, read from the file
resnet34-b627a593.pth in the current folder (or from --config.init.torch). See
imagenet_resnet50_tpp.py for other forms of the data and for inspecting what is pruned.
"""

import ml_collections

from tpp_jax.experiment.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "resnet34"
    config.data.name = "imagenet2012"
    config.data.batch_size = 256
    config.init.torch = "resnet34-b627a593.pth"
    config.eval_every = 5004  # once an epoch
    config.checkpoint_every = 2500

    config.prune.ratios = "*layer1*.conv1:0.5,*layer2*.conv1:0.6,*layer3*.conv1:0.4"
    config.prune.skip = "*layer[1-3].0.conv1,*layer2.3.conv1,*layer3.5.conv1"
    config.prune.learning_rate = 1e-3
    config.prune.weight_decay = 1e-4
    config.prune.schedule.granularity = 1e-4
    config.prune.schedule.every = 5
    config.prune.schedule.stabilize = 40_000

    config.finetune.epochs = 90
    config.finetune.learning_rate = "0:0.01,30:0.001,60:0.0001,75:0.00001"
    config.finetune.weight_decay = 1e-4
    return config
