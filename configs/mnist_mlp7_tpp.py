"""MLP-7-Linear on MNIST: seven dense layers, no activation, no batch norm.

Expected test accuracy, from the paper (its ratio is not published): 92.82 % after
fine-tuning at 0.01, 92.77 % at 0.001; plain L1 pruning gets 91.36 % and 90.54 %.

    python launch.py --config=configs/mnist_mlp7_tpp.py --workdir=runs/mlp7 \\
        --config.data.dir=$TFDS

The same experiment runs on other images of this shape with --config.data.name=kmnist or
fashion_mnist.
"""

import ml_collections

from tpp_jax.experiment.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "mlp7_linear"
    config.data.name = "mnist"
    config.data.pad_to = 32
    config.data.batch_size = 100
    config.data.crop_padding = 0
    config.data.flip = False
    config.steps_per_dispatch = 100  # no convolutions, so loops are fast on the CPU
    config.log_every = 200
    config.eval_every = 6000
    config.checkpoint_every = 6000

    config.pretrain.epochs = 90
    config.pretrain.learning_rate = "0:0.01,30:0.001,60:0.0001"
    config.pretrain.weight_decay = 1e-4

    config.prune.ratios = "*net*:0.8"
    config.prune.skip = "net.12"
    config.prune.weight_decay = 1e-4
    config.prune.schedule.granularity = 1e-4
    config.prune.schedule.every = 10
    config.prune.schedule.stabilize = 10_000

    config.finetune.epochs = 90
    config.finetune.learning_rate = "0:0.01,30:0.001,60:0.0001"
    config.finetune.weight_decay = 1e-4
    return config
