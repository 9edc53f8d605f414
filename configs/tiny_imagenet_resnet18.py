"""ResNet-18 on Tiny ImageNet: class folders, as for your own images.

This experiment is in no table. The recipe is that of ImageNet with a shorter schedule;
it has not been run here. Images are read from <folder>/train/<class>/ and
<folder>/val/<class>/. Tiny ImageNet has its val images in one folder with a list of
their classes (val_annotations.txt); docs/data.md shows how to sort them.

    python launch.py --config=configs/tiny_imagenet_resnet18.py \\
        --workdir=runs/tiny --config.data.dir=<folder>
"""

import ml_collections

from tpp_jax.experiment.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "resnet18"
    config.data.name = "folder"
    config.data.image_size = 64
    config.data.resize = 64  # test images are not cropped
    config.data.batch_size = 256

    config.pretrain.epochs = 90
    config.pretrain.learning_rate = "0:0.1,30:0.01,60:0.001"
    config.pretrain.weight_decay = 1e-4

    config.prune.ratios = "*layer*.conv1:0.5"
    config.prune.weight_decay = 1e-4
    config.prune.schedule.granularity = 1e-3
    config.prune.schedule.every = 10
    config.prune.schedule.stabilize = 3_000

    config.finetune.epochs = 60
    config.finetune.learning_rate = "0:0.01,30:0.001,45:0.0001"
    config.finetune.weight_decay = 1e-4
    return config
