"""What window classifiers of hyperspectral scenes are compared with."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.nn.linear import Linear
from research.vision.hyperspectral.morphology import neighbours


class PixelMLP(nn.Module):
    """An MLP over the spectrum in the middle of a window alone. images [B, H, W, C] -> float32 [B, num_classes].

    hidden_dims: units of the hidden layers, with ReLU.
    """

    num_classes: int
    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images[:, images.shape[1] // 2, images.shape[2] // 2]
        for i, units in enumerate(self.hidden_dims):
            x = nn.relu(Linear(units, use_bias=True, name=f"hidden_{i}")(x))
        return Linear(self.num_classes, use_bias=True, name="head")(x).astype(jnp.float32)


class PatchCNN(nn.Module):
    """3 x 3 convolutions with zero padding and ReLU, then an MLP over all places.

    images [B, H, W, C] -> float32 [B, num_classes].

    widths: channels of the convolutions. hidden_dim: units of the layer behind them.
    """

    num_classes: int
    widths: tuple[int, ...]
    hidden_dim: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i, width in enumerate(self.widths):
            around = jnp.moveaxis(neighbours(x, 3, 0.0), 0, 3)  # [B, H, W, 9, C]
            columns = around.reshape(*x.shape[:3], -1)
            x = nn.relu(Linear(width, use_bias=True, name=f"convolution_{i}")(columns))
        x = nn.relu(Linear(self.hidden_dim, use_bias=True, name="hidden")(x.reshape(x.shape[0], -1)))
        return Linear(self.num_classes, use_bias=True, name="head")(x).astype(jnp.float32)
