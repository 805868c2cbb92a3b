"""A ResNet and a ViT for small grey pictures, in Flax nnx.

Weights are float32 when they are made and may be stored in less: each layer converts
them to `dtype` where it uses them, so a gradient has its weight's dtype. Shapes in
comments: B batch, H and W pixels, C channels, T patches, D features.
"""

import jax
import jax.numpy as jnp
from flax import nnx

CLASSES = 10


def scaled(images, dtype):  # (B, H, W) uint8 -> (B, H, W), from -1 to 1
    return images.astype(dtype) / 127.5 - 1


def conv(inputs: int, features: int, size: int, stride: int, dtype, rngs: nnx.Rngs):
    return nnx.Conv(
        inputs,
        features,
        kernel_size=(size, size),
        strides=stride,
        use_bias=False,
        kernel_init=nnx.initializers.he_normal(),
        dtype=dtype,
        rngs=rngs,
    )


def group_norm(features: int, dtype, rngs: nnx.Rngs):
    # Statistics of one picture alone: nothing to keep, no matter how batches are made.
    groups = min(32, features // 4)
    return nnx.GroupNorm(features, num_groups=groups, dtype=dtype, rngs=rngs)


class ResidualBlock(nnx.Module):
    """Norm, ReLU and convolution, two or three times, added to the input."""

    def __init__(
        self,
        inputs: int,
        features: int,
        stride: int,
        *,
        bottleneck: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.outputs = 4 * features if bottleneck else features
        layers = [(3, features, stride), (3, features, 1)]  # size, features, stride
        if bottleneck:
            layers = [(1, features, 1), (3, features, stride), (1, self.outputs, 1)]
        same = stride == 1 and inputs == self.outputs
        shortcut = None if same else conv(inputs, self.outputs, 1, stride, dtype, rngs)
        self.shortcut = shortcut
        self.norms, self.convs = nnx.List(), nnx.List()
        for size, features, stride in layers:
            self.norms.append(group_norm(inputs, dtype, rngs))
            self.convs.append(conv(inputs, features, size, stride, dtype, rngs))
            inputs = features

    def __call__(self, x):  # (B, H, W, C) -> (B, H / stride, W / stride, outputs)
        y = nnx.relu(self.norms[0](x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.convs[0](y)
        for norm, conv in zip(self.norms[1:], self.convs[1:], strict=True):
            y = conv(nnx.relu(norm(y)))
        return x + y


class ResNet(nnx.Module):
    """Pre-activation residual blocks in stages: half the pixels, twice the features.

    Args:
      width: features of the first stage.
      blocks: of each stage.
      bottleneck: three convolutions a block, the middle one narrow.
      stem_stride: of the first convolution; 2 for a quarter of the work.
      dtype: of activations.
      rngs: of the first weights.
    """

    def __init__(
        self,
        width: int,
        blocks: tuple[int, ...],
        *,
        bottleneck: bool = False,
        stem_stride: int = 1,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.stem = conv(1, width, 3, stem_stride, dtype, rngs)
        self.blocks, features = nnx.List(), width
        for stage, count in enumerate(blocks):
            for i in range(count):
                block = ResidualBlock(
                    features,
                    width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    bottleneck=bottleneck,
                    dtype=dtype,
                    rngs=rngs,
                )
                self.blocks.append(block)
                features = block.outputs
        self.norm = group_norm(features, dtype, rngs)
        self.head = nnx.Linear(features, CLASSES, dtype=dtype, rngs=rngs)

    def __call__(self, images):  # (B, H, W) uint8 -> (B, CLASSES) float32
        x = self.stem(scaled(images, self.dtype)[..., None])
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.norm(x)).mean(axis=(1, 2))
        return self.head(x).astype(jnp.float32)


class EncoderBlock(nnx.Module):
    """Attention of all patches to all, then an MLP, each added to its input."""

    def __init__(self, width: int, heads: int, *, dtype, rngs: nnx.Rngs):
        def linear(inputs, outputs, **kwargs):
            return nnx.Linear(inputs, outputs, dtype=dtype, rngs=rngs, **kwargs)

        # What is added to x starts at zero: the model begins as the identity.
        adding = {"kernel_init": nnx.initializers.zeros}

        self.heads = heads
        self.attention_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width, **adding)
        self.mlp_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width, **adding)

    def __call__(self, x):  # (B, T, D) -> (B, T, D)
        y = self.qkv(self.attention_norm(x))
        y = y.reshape(*x.shape[:-1], 3, self.heads, -1)
        y = jax.nn.dot_product_attention(y[:, :, 0], y[:, :, 1], y[:, :, 2])
        x = x + self.out(y.reshape(x.shape))
        y = nnx.gelu(self.up(self.mlp_norm(x)))
        return x + self.down(y)


class ViT(nnx.Module):
    """Square patches as tokens of a transformer; the mean of them is classified.

    Args:
      size: pixels along each side of a picture.
      patch: pixels along each side of a patch.
      width: features, D.
      depth: layers.
      heads: of attention.
      dtype: of activations.
      rngs: of the first weights.
    """

    def __init__(
        self,
        size: int,
        patch: int,
        *,
        width: int,
        depth: int,
        heads: int,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch, self.dtype = patch, dtype
        patches = (size // patch) ** 2
        positions = nnx.initializers.normal(0.02)(rngs.params(), (patches, width))
        self.embed = nnx.Linear(patch**2, width, dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Param(positions)
        self.blocks = nnx.List(
            EncoderBlock(width, heads, dtype=dtype, rngs=rngs) for _ in range(depth)
        )
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, dtype=dtype, rngs=rngs)

    def __call__(self, images):  # (B, H, W) uint8 -> (B, CLASSES) float32
        x, p = scaled(images, self.dtype), self.patch
        batch, height, width = x.shape
        x = x.reshape(batch, height // p, p, width // p, p).swapaxes(2, 3)
        x = self.embed(x.reshape(batch, -1, p * p))  # (B, T, D)
        x = x + self.position_embedding[...].astype(self.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1)).astype(jnp.float32)
