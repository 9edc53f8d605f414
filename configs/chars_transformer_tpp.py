"""A small transformer on the sources of Python's library: half its heads and MLPs.

The network reads bytes; the text is on every machine that has Python. Less than five
minutes on two CPU cores.

    python launch.py --config=configs/chars_transformer_tpp.py --workdir=runs/chars
"""

import ml_collections

from tpp_jax.experiment.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.task.name = "language_modelling"
    config.data.name = "python"
    config.data.length = 64
    config.data.batch_size = 16
    config.data.held_out = 0.04
    config.model.name = "small_decoder"
    config.model.kwargs = {
        "width": 64,
        "depth": 3,
        "heads": 4,
        "kv_heads": 2,
        "hidden": 176,
    }
    config.pretrain.epochs = 1
    config.pretrain.optimizer = "adamw"
    config.pretrain.schedule = "cosine"
    config.pretrain.learning_rate = "0.003"
    config.pretrain.weight_decay = 0.01
    config.finetune.epochs = 1
    config.finetune.optimizer = "adamw"
    config.finetune.schedule = "cosine"
    config.finetune.learning_rate = "0.001"
    config.finetune.weight_decay = 0.01
    config.prune.ratios = "*.mlp.gate_proj:0.5,*.self_attn.q_proj:0.5"
    config.prune.optimizer = "adamw"
    config.prune.learning_rate = 1e-3
    config.prune.weight_decay = 0.01
    config.prune.gram_weight = 1.0
    config.prune.target = "relative"
    config.prune.schedule.granularity = 20 / 30
    config.prune.schedule.ceiling = 20.0
    config.prune.schedule.every = 10
    config.prune.schedule.stabilize = 199
    config.prune.schedule.zero_out_every = 5
    config.eval_every = 10000
    config.log_every = 100
    return config
