from tpp_jax.experiment.config import default_config


def get_config():
    config = default_config()
    config.task.name = "denoise:Denoise"
    config.task.kwargs = {"width": 16}
    config.data.batch_size = 64
    config.pretrain.epochs = 6
    config.pretrain.optimizer = "adamw"
    config.pretrain.learning_rate = "0.003"
    config.prune.ratios = "stem:0.5,down:0.5,middle:0.5,up:0.5"
    config.prune.optimizer = "adamw"
    config.prune.target = "relative"
    config.prune.gram_weight = 1.0
    config.prune.schedule.granularity = 1.0
    config.prune.schedule.ceiling = 30.0
    config.prune.schedule.every = 4
    config.prune.schedule.stabilize = 60
    config.prune.schedule.zero_out_every = 5
    config.finetune.epochs = 4
    config.finetune.optimizer = "adamw"
    config.finetune.learning_rate = "0.001"
    return config
