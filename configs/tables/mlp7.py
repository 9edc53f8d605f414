"""MLP-7-Linear on MNIST: accuracy and Jacobian singular values (paper, Table 3).

The paper does not publish its pruning ratio; the table has 0.8 and 0.9, with the
paper's numbers for both.

    python launch.py --mode=sweep --config=configs/tables/mlp7.py --workdir=runs/mlp7 \\
        --config.base.data.dir=$TFDS
"""

import ml_collections

from configs import mnist_mlp7_tpp
from tpp_jax.commands.sweep import default_table

_PAPER = {
    "L1": (91.36, 90.54, 0.0040),
    "L1 + OrthP": (92.79, 92.77, 1.0000),
    "TPP": (92.82, 92.77, 3.4875),
}


def get_config() -> ml_collections.ConfigDict:
    table = default_table()
    table.title = "MLP-7-Linear on MNIST"
    table.base = mnist_mlp7_tpp.get_config()
    table.base.eval_every = 600  # once an epoch
    # Measured at the end of each phase and after the cut only, which costs little.
    table.base.jacobian_every = 10**9
    table.metrics = ("best_accuracy", "last_accuracy", "jsv_mean")
    table.rows = (
        ("L1", {"prune": {"method": "oneshot"}}),
        ("L1 + OrthP", {"prune": {"method": "oneshot", "reinitialize": "orthp"}}),
        ("TPP", {}),
    )
    rates = {
        "LR 1e-2": "0:0.01,30:0.001,60:0.0001",
        "LR 1e-3": "0:0.001,30:0.0001,60:0.00001",
    }
    table.columns = tuple(
        (
            f"{ratio}, {name}",
            {
                "prune": {"ratios": f"*net*:{ratio}"},
                "finetune": {"learning_rate": rate},
            },
        )
        for ratio in (0.8, 0.9)
        for name, rate in rates.items()
    )
    table.paper = tuple(
        published
        for column, _ in table.columns
        for row, (high, low, jsv) in _PAPER.items()
        for published in (
            (row, column, "best_accuracy", high if "1e-2" in column else low, None),
            (row, column, "jsv_mean", jsv, None),
        )
    )
    return table
