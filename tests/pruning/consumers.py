"""Layers of all kinds that read the channels of a group, each a function of its kernel.

Each is linear in its kernel, so that its Jacobian is what it reads: a reference that
shares nothing with the code that is tested.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CHANNELS = 6
IMAGE = 2, 5, 4, CHANNELS  # examples, height, width, channels
NHWC = ("NHWC", "HWIO", "NHWC")


def convolution(strides=(1, 1), padding="SAME", layout=NHWC, **options):
    return lambda w, z: lax.conv_general_dilated(
        z, w, strides, padding, dimension_numbers=layout, **options
    )


def attention_output(w, z):
    heads = z.reshape(*z.shape[:-1], *w.shape[:2])
    return jnp.einsum("...hd,hdo->...o", heads, w)


def flattened(w, z):
    return z.reshape(z.shape[0], -1) @ w


def channels_first(w, z):
    z = z.transpose(0, 3, 1, 2)
    return convolution(layout=("NCHW", "OIHW", "NCHW"))(w, z)


def cut_and_turned(w, z):
    """Gates side by side in one kernel of outputs by inputs."""
    one, other = jnp.split(w, 2, axis=0)
    return jnp.concatenate([z @ one.T, z[::-1] @ other.T], axis=-1)


def shared(w, z):
    """One kernel for what is read and for its negative shifted copy."""
    return jnp.stack([z @ w, (0.5 - z) @ w])


def experts(w, z):
    """Every expert reads other examples: a product of batches."""
    return jnp.einsum("ebc,eco->ebo", z.reshape(4, -1, z.shape[-1]), w)


def scanned(w, z):
    """A loop that uses the same kernel for each row of pixels."""
    _, y = lax.scan(lambda carry, row: (carry, row @ w), 0.0, jnp.moveaxis(z, 1, 0))
    return y


def one_of_two(w, z):
    """A branch that reads with the kernel, and one that does not."""
    return lax.cond(
        jnp.size(z) > 0, lambda: z @ w, lambda: jnp.zeros((*z.shape[:-1], 3))
    )


def repeated(w, z):
    """A while loop that reads with the kernel three times."""

    def body(state):
        i, total = state
        return i + 1, total + (z * i) @ w

    start = jnp.float32(1), jnp.zeros((*z.shape[:-1], 3))
    return lax.while_loop(lambda state: state[0] < 4, body, start)[1]


# Name → (function of kernel and input, shape of the kernel).
KINDS = {
    "dense": (lambda w, z: z @ w, (6, 3)),
    "pointwise": (convolution(), (1, 1, 6, 3)),
    "window": (convolution(), (3, 3, 6, 3)),
    "even window": (convolution(padding=((1, 0), (0, 1))), (2, 2, 6, 3)),
    "strided": (convolution((2, 2)), (3, 3, 6, 3)),
    "negative padding": (convolution(padding=((-1, 0), (0, -1))), (2, 2, 6, 3)),
    "dilated": (convolution(rhs_dilation=(2, 1)), (3, 3, 6, 3)),
    "grouped": (convolution(feature_group_count=2), (3, 3, 3, 4)),
    "transposed": (
        lambda w, z: lax.conv_transpose(z, w, (2, 2), "SAME"),
        (3, 3, 6, 3),
    ),
    "transposed, gradient": (
        lambda w, z: lax.conv_transpose(z, w, (2, 2), "SAME", transpose_kernel=True),
        (3, 3, 3, 6),
    ),
    "channels first": (channels_first, (3, 6, 3, 3)),
    "einsum": (lambda w, z: jnp.einsum("bhwc,oc->bohw", z, w), (3, 6)),
    "kernel on the left": (lambda w, z: w @ z.reshape(-1, z.shape[-1]).T, (3, 6)),
    "attention output": (attention_output, (2, 3, 3)),
    "flattened": (flattened, (5 * 4 * 6, 3)),
    "cut and turned": (cut_and_turned, (4, 6)),
    "shared": (shared, (6, 3)),
    "experts": (experts, (4, 6, 3)),
    "scanned": (scanned, (6, 3)),
    "checkpointed": (jax.checkpoint(lambda w, z: z @ w), (6, 3)),
    "branch": (one_of_two, (6, 3)),
}


def channels(params, x):
    """What the kernels read: images of some channels."""
    return jax.nn.relu(x @ params["first"]["kernel"])


def model(reader, params, x):
    """Channels, a layer that reads them, and its bias where the outputs are last."""
    return reader(params["second"]["kernel"], channels(params, x))


def example(kind, seed=0):
    """Returns ``(function, params, batches, reader)`` of a kind."""
    reader, shape = KINDS[kind]
    rng = np.random.default_rng(seed)
    params = {
        "first": {"kernel": rng.normal(size=(5, CHANNELS))},
        "second": {"kernel": rng.normal(size=shape)},
    }
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    batches = [
        jnp.asarray(rng.normal(size=(*IMAGE[:3], 5)) + 0.5, jnp.float32)
        for _ in range(3)
    ]
    return functools.partial(model, reader), params, batches, reader


def jacobian(params, batches, reader):
    """Returns what each output's derivative by each weight is, ``[rows, weights]``."""
    kernel = params["second"]["kernel"]
    rows = []
    for x in batches:
        z = channels(params, x)
        derivative = jax.jacobian(lambda w, z=z: reader(w, z))(kernel)
        rows.append(np.asarray(derivative, np.float64).reshape(-1, kernel.size))
    return np.concatenate(rows)
