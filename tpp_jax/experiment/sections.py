"""The sections of a run's config: each field with its default, bounds and meaning."""

import dataclasses
from typing import Literal

from tpp_jax.experiment.fields import field
from tpp_jax.experiment.methods import METHODS
from tpp_jax.method.gram import Target
from tpp_jax.method.isometry import RECIPES
from tpp_jax.pruning.criteria import CRITERIA, REDUCTIONS
from tpp_jax.pruning.targets import SCOPES
from tpp_jax.training.optimizers import OPTIMIZERS, ORTHOGONALITY, SCHEDULES

_LARGEST_IMAGE = 2**14  # pixels on a side


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and its arithmetic."""

    name: str = field(
        "cifar_resnet56", "Name of the network, one of `tpp_jax.models.names()`."
    )
    dtype: Literal["float32", "bfloat16"] = field(
        "float32",
        "Type that the network computes in; parameters, batch statistics and the loss "
        "are float32 in any case.",
    )
    remat: bool = field(
        False,
        "Whether the backward pass recomputes everything but convolutions and matrix "
        "products, which saves memory.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set, its batches and its augmentation."""

    name: str = field("cifar10", "Name of the data set, see [data.md](data.md).")
    dir: str = field(
        "",
        "Folder of the prepared data or of class folders; empty for the default folder "
        "of TensorFlow Datasets.",
        is_path=True,
    )
    pad_to: int = field(
        0,
        "Height and width in pixels that images in memory are zero-padded to; "
        "0 for no padding.",
        most=_LARGEST_IMAGE,
    )
    batch_size: int = field(
        128, "Images in a training batch, over all devices together.", least=1
    )
    crop_padding: int = field(
        4,
        "Pixels of zeros on each side of an image in memory before its random crop; "
        "0 for no crop.",
        most=_LARGEST_IMAGE,
    )
    flip: bool = field(True, "Whether training images are mirrored at random.")
    image_size: int = field(
        224,
        "Height and width in pixels of streamed images after the crop.",
        least=1,
        most=_LARGEST_IMAGE,
    )
    resize: int = field(
        256,
        "Shorter side in pixels of streamed test images before their centre crop; at "
        "least `image_size`.",
        least=1,
        most=_LARGEST_IMAGE,
    )
    workers: int = field(
        0,
        "Number of processes that decode streamed images; 0 for threads of the main "
        "process.",
        most=1000,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Trained weights to start from."""

    model: str = field(
        "",
        "Folder of a network saved by `tpp_jax.save_model`, such as `dense/` of "
        "another run; empty for none.",
        is_path=True,
    )
    torch: str = field(
        "",
        "File of PyTorch weights (`.pth` or `.safetensors`); empty for none.",
        is_path=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A phase of plain training."""

    epochs: int = field(0, "Length of the phase in epochs; 0 skips it.")
    learning_rate: str | float = field(
        "0.1",
        "Learning rate: one number, or the rate from each epoch on, as in "
        "`0:0.1,100:0.01`.",
    )
    schedule: str = field(
        "step",
        "Shape of the learning rate over time: constant between the given epochs, or "
        "one cosine from the given rate down to 0.",
        choices=SCHEDULES,
    )
    warmup_epochs: float = field(
        0.0, "Length in epochs of the rate's linear rise from 0; 0 for none."
    )
    optimizer: str = field("sgd", "Name of the optimizer.", choices=OPTIMIZERS)
    momentum: float = field(0.9, "Momentum of SGD; β₁ of AdamW and LAMB.", below=1)
    nesterov: bool = field(False, "Whether SGD uses Nesterov momentum.")
    weight_decay: float = field(5e-4, "Weight decay.")
    decay_norms: bool = field(
        True, "Whether biases and the scales of norms decay as well."
    )
    label_smoothing: float = field(
        0.0, "Share of each label that is spread evenly over all classes.", below=1
    )
    mixup: float = field(
        0.0,
        "α of mixup's Beta(α, α); 0 for no mixup. If `cutmix` is set too, each batch "
        "gets one of the two at random.",
        least_above_zero=1e-6,  # no number can be drawn from Beta(1e-38, 1e-38)
    )
    cutmix: float = field(
        0.0, "α of cutmix's Beta(α, α); 0 for no cutmix.", least_above_zero=1e-6
    )
    ema: float = field(
        0.0,
        "Decay per step of an exponential moving average of the weights, which is "
        "evaluated and kept in place of them; 0 for none.",
        below=1,  # an average with a decay of 1 never changes
    )
    orthogonality: str = field(
        "",
        "Penalty that keeps filters orthogonal: KernOrth (`kernel`), OrthConv "
        "(`convolution`), or none.",
        choices=ORTHOGONALITY,
    )
    orthogonality_weight: float = field(0.1, "Weight of that penalty.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowConfig:
    """The phase of `greg2` and `group_lasso` before the channels are chosen."""

    granularity: float = field(
        1e-5, "Increment of the L2 strength in each interval (`greg2`).", above=0
    )
    every: int = field(10, "Steps in an interval (`greg2`).", least=1)
    ceiling: float = field(1e-2, "Strength at which the phase ends (`greg2`).", above=0)
    weight: float = field(1e-3, "Weight of the group lasso (`group_lasso`).")
    steps: int = field(
        0,
        "Length in steps (`group_lasso`); 0 for as many as TPP regularizes and "
        "stabilizes.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the strength λ of TPP's penalties grows."""

    kind: str = field(
        "linear",
        "Growth of λ: `linear`, or `poly` and a power (`poly2`, `poly3`, …).",
    )
    granularity: float = field(
        1e-4, "Increment of λ in each interval (`linear` only).", above=0
    )
    every: int = field(10, "Steps in an interval.", least=1)
    ceiling: float = field(1.0, "λ at the end of the growth.", above=0)
    stabilize: int = field(10_000, "Steps at full strength after the growth.")
    zero_out_every: int = field(
        100,
        "Steps at full strength between setting the pruned filters of one layer to "
        "zero and those of the next.",
        least=1,
    )
    regularize_steps: int = field(
        0,
        "Length of the growth in steps, a multiple of `every` (`poly` only; 0 with "
        "`linear`).",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What is pruned, by which method. The defaults are the paper's for CIFAR."""

    method: str = field(
        "tpp",
        "Method: TPP, one of its rivals, or `none` to train the dense network only; "
        "see [tables.md](tables.md).",
        choices=tuple(METHODS),
    )
    ratios: str = field(
        "*layer*.conv1:0.5",
        "Share of the channels to remove, as pattern:share pairs separated by commas; "
        "empty with a target to prune all groups alike. See [plans.md](plans.md).",
    )
    flops: float = field(
        0.0, "Target: share of the FLOPs that remains; 0 for no target.", most=1
    )
    params: float = field(
        0.0, "Target: share of the parameters that remains; 0 for no target.", most=1
    )
    skip: str = field(
        "", "Patterns of layers that are not pruned, separated by commas."
    )
    criterion: str = field(
        "l1",
        "Importance score of a channel: "
        f"{', '.join(f'`{name}`' for name in CRITERIA)}, or `random`.",
    )
    batches: int = field(
        4,
        "Training batches that `taylor`, `taylor_fo`, `hessian`, `activation`, `wanda` "
        "and `variance` measure.",
        least=1,
    )
    scope: str = field(
        "local",
        "Where scores compete: within each group, among all groups, or among groups of "
        "the same shape.",
        choices=tuple(SCOPES),
    )
    reduce: str = field(
        "mean",
        "How the scores of a channel in the layers of its group become one.",
        choices=tuple(REDUCTIONS),
    )
    round_to: int = field(
        1,
        "Kept channels of a group are rounded up to a multiple of this number.",
        least=1,
    )
    min_channels: int = field(
        1, "Smallest number of channels kept in a group.", least=1
    )
    learning_rate: float = field(
        1e-3,
        "Learning rate of SGD, constant, in all phases but `pretrain` and `finetune`.",
    )
    momentum: float = field(0.9, "Momentum in the same phases.", below=1)
    weight_decay: float = field(5e-4, "Weight decay in the same phases.")
    gram_weight: float = field(
        1000.0, "Weight of the Gram penalty; 0 for no decorrelation."
    )
    bn: bool = field(
        True, "Whether the scales and biases of norms are shrunk for pruned channels."
    )
    l2: bool = field(True, "Whether pruned filters and their biases are shrunk.")
    target: Target = field(
        "decorrelate",
        "What the Gram penalty asks for: pruned filters decorrelated from all others, "
        "or also kept filters orthonormal (an ablation).",
    )
    kept_weight: float = field(
        0.0,
        "Weight of a penalty that makes kept filters orthonormal (an ablation, there "
        "0.1); 0 for none.",
    )
    reinitialize: str = field(
        "",
        "Recipe by which kernels are initialized again after the cut, see "
        "[trainability.md](trainability.md); empty for none.",
        choices=("", *RECIPES),
    )
    rounds: int = field(
        5, "Number of rounds of the method `iterative`.", least=1, most=1000
    )
    grow: GrowConfig = field(
        GrowConfig(),
        "The phase before channels are chosen: growing L2 (`greg2`) or the group lasso "
        "(`group_lasso`) on all filters. Other methods do not read it.",
    )
    schedule: ScheduleConfig = field(
        ScheduleConfig(),
        "How the strength λ of TPP's penalties grows, and how long it is then held.",
    )
