"""A small U-Net that removes noise from photographs: model, data and loss."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_sample_images

SIZE, NOISE = 16, 0.1


class UNet(nnx.Module):
    def __init__(self, rngs, width):
        def conv(inputs, outputs):
            return nnx.Conv(inputs, outputs, (3, 3), rngs=rngs)

        self.stem = conv(3, width)
        self.down = conv(width, 2 * width)
        self.middle = conv(2 * width, 2 * width)
        self.up = conv(3 * width, width)
        self.head = conv(width, 3)

    def __call__(self, x):
        fine = nnx.relu(self.stem(x))
        coarse = nnx.relu(self.down(nnx.max_pool(fine, (2, 2), (2, 2))))
        coarse = nnx.relu(self.middle(coarse)).repeat(2, axis=1).repeat(2, axis=2)
        return x + self.head(nnx.relu(self.up(jnp.concatenate([fine, coarse], -1))))


class Denoise:
    examples, headline = "patches", "rmse"

    def __init__(self, width=16):
        self.width = width
        patches = []
        for image in load_sample_images().images:
            rows, columns = (n // SIZE * SIZE for n in image.shape[:2])
            grid = image[:rows, :columns].reshape(rows // SIZE, SIZE, -1, SIZE, 3)
            patches.append(grid.swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3) / 255)
        patches = np.random.default_rng(0).permutation(np.concatenate(patches))
        self.train, self.evaluation = np.split(patches.astype("float32"), [-400])

    def model(self, rngs):
        return UNet(rngs, self.width)

    def loss(self, model, batch, key):
        noisy = batch + NOISE * jax.random.normal(key, batch.shape)
        return jnp.square(model(noisy) - batch).mean()

    def report(self, means):
        return {**means, "rmse": means["loss"] ** 0.5}
