"""Full-integer models as TensorFlow's converter writes them, from Keras networks.

    python tests/evidence/stock_keras.py FOLDER [NAME ...]

Weights are drawn; batch normalization sees the calibration samples first, so that activations
spread as in trained networks. Runs in an environment that has TensorFlow (tensorflow-cpu 2.21.0 on
Python 3.11) and nothing of this project. The small files lie in ``tests/stock_models``, so that the
tests read them without TensorFlow.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras import layers  # noqa: E402

SAMPLES = 64
Layer = Any


@dataclass(frozen=True)
class Settings:
    """How a network is converted.

    ``edges``: type of input and output; ``batch``: written into the file, None leaves it free.
    """

    edges: str = "int8"
    batch: int | None = None
    per_channel: bool = True
    wide: bool = False


def _block(x: Layer, channels: int, stride: int = 1, kernel: int = 3, act: str = "relu") -> Layer:
    x = layers.Conv2D(channels, kernel, stride, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    return layers.Activation(act)(x) if act else x


def _separable(x: Layer, channels: int, stride: int = 1, act: Callable[..., Layer] | str = "relu6"):
    for layer in (
        layers.DepthwiseConv2D(3, stride, padding="same", use_bias=False),
        layers.Conv2D(channels, 1, use_bias=False),
    ):
        x = layers.Activation(act)(layers.BatchNormalization()(layer(x)))
    return x


def mobilenet_v1(source: Layer) -> Layer:
    """Depthwise separable blocks, a global mean, SOFTMAX."""
    x = _block(source, 8, 2, act="relu6")
    for channels, stride in ((16, 1), (24, 2), (24, 1), (32, 2)):
        x = _separable(x, channels, stride)
    x = layers.GlobalAveragePooling2D()(x)
    return layers.Softmax()(layers.Dense(10)(x))


def resnet_8(source: Layer) -> Layer:
    """The image classifier of MLPerf Tiny, narrower: residual sums, an average pool, Flatten."""
    x = _block(source, 8)
    for channels, stride in ((8, 1), (16, 2), (32, 2)):
        y = _block(_block(x, channels, stride), channels, act="")
        if stride > 1:
            x = layers.Conv2D(channels, 1, stride, padding="same")(x)
        x = layers.Activation("relu")(layers.Add()([x, y]))
    x = layers.Flatten()(layers.AveragePooling2D(8)(x))
    return layers.Dense(10, activation="softmax")(x)


def ds_cnn(source: Layer) -> Layer:
    """The keyword spotter of MLPerf Tiny, narrower."""
    x = layers.Conv2D(16, (10, 4), 2, padding="same", use_bias=False)(source)
    x = layers.Dropout(0.2)(layers.Activation("relu")(layers.BatchNormalization()(x)))
    for _ in range(3):
        x = _separable(x, 16, act="relu")
    x = layers.Flatten()(layers.AveragePooling2D((25, 5))(layers.Dropout(0.4)(x)))
    return layers.Dense(12, activation="softmax")(x)


def autoencoder(source: Layer) -> Layer:
    """The anomaly detector of MLPerf Tiny, narrower: dense layers alone."""
    x = source
    for width in (48, 32, 8, 32, 48):
        x = layers.Activation("relu")(layers.BatchNormalization()(layers.Dense(width)(x)))
    return layers.Dense(64)(x)


def lenet(source: Layer) -> Layer:
    """VALID convolutions with bias, max pools, Flatten."""
    x = layers.MaxPooling2D()(layers.Conv2D(6, 5, activation="relu")(source))
    x = layers.MaxPooling2D(3, 2, "same")(layers.Conv2D(12, 3, activation="tanh")(x))
    x = layers.Dense(20, activation="sigmoid")(layers.Flatten()(x))
    return layers.Dense(10)(x)


def sine(source: Layer) -> Layer:
    """The hello world of TensorFlow Lite for microcontrollers."""
    x = layers.Dense(16, activation="relu")(source)
    return layers.Dense(1)(layers.Dense(16, activation="relu")(x))


def gestures(source: Layer) -> Layer:
    """Convolutions over time."""
    x = layers.Conv1D(8, 5, activation="relu", padding="same")(source)
    x = layers.MaxPooling1D(2)(x)
    x = layers.Conv1D(12, 3, strides=2, activation="relu")(x)
    return layers.Dense(4, activation="softmax")(layers.Flatten()(x))


def gated(source: Layer) -> Layer:
    """Squeeze and excitation, hard swish, sums with constants, branches joined."""
    x = layers.Activation("hard_swish")(layers.ZeroPadding2D(1)(_block(source, 8, 2, act="")))
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(8, 1, activation="sigmoid")(layers.Conv2D(4, 1, activation="relu")(gate))
    x = layers.Multiply()([x, gate])
    ends = [
        layers.Conv2D(6, 1, activation="relu")(x),
        layers.LeakyReLU(negative_slope=0.1)(layers.Conv2D(6, 3, padding="same")(x)),
        layers.AveragePooling2D(3, 1, "same")(x),
    ]
    x = layers.Concatenate()(ends)
    x = layers.Conv2D(8, 3, 2, padding="same", activation="relu")(x)
    return layers.Softmax()(layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))


def dilated(source: Layer) -> Layer:
    """Convolutions with holes."""
    x = layers.Conv2D(6, 3, dilation_rate=2, padding="same", activation="relu")(source)
    x = layers.DepthwiseConv2D(3, dilation_rate=(3, 3), activation="relu")(x)
    return layers.Dense(5)(layers.Flatten()(layers.MaxPooling2D(2)(x)))


def bottlenecks(source: Layer) -> Layer:
    """Inverted residuals of MobileNetV2: linear sums, padded strides."""
    x = _block(source, 8, 2, act="relu6")
    for channels, stride in ((8, 1), (12, 2), (12, 1)):
        y = layers.Activation("relu6")(
            layers.BatchNormalization()(layers.Conv2D(24, 1, use_bias=False)(x))
        )
        if stride > 1:
            y = layers.ZeroPadding2D(((0, 1), (0, 1)))(y)
        y = layers.DepthwiseConv2D(
            3, stride, padding="same" if stride == 1 else "valid", use_bias=False
        )(y)
        y = layers.Activation("relu6")(layers.BatchNormalization()(y))
        y = layers.BatchNormalization()(layers.Conv2D(channels, 1, use_bias=False)(y))
        x = layers.Add()([x, y]) if stride == 1 else y
    x = layers.GlobalAveragePooling2D()(_block(x, 24, kernel=1, act="relu6"))
    return layers.Dense(3, activation="softmax")(x)


def mobilenet_v2(source: Layer) -> Layer:
    """The published network, 0.35 wide."""
    return keras.applications.MobileNetV2(
        input_tensor=source, alpha=0.35, weights=None, classes=10
    ).output


def upsampled(source: Layer) -> Layer:
    """A decoder's RESIZE_NEAREST_NEIGHBOR."""
    x = layers.UpSampling2D(2)(layers.Conv2D(4, 3, 2, padding="same")(source))
    return layers.Conv2D(1, 3, padding="same")(x)


@dataclass(frozen=True)
class Recipe:
    """A network: its function, its input's shape, and how it is converted."""

    network: Callable[[Layer], Layer]
    shape: tuple[int, ...]
    settings: Settings = Settings()


IMAGE, SOUND = (32, 32, 3), (49, 10, 1)
RECIPES: dict[str, Recipe] = {
    "mobilenet_v1": Recipe(mobilenet_v1, IMAGE),
    "resnet_8": Recipe(resnet_8, IMAGE),
    "ds_cnn": Recipe(ds_cnn, SOUND),
    "ds_cnn_float_edges": Recipe(ds_cnn, SOUND, Settings(edges="float32")),
    "ds_cnn_uint8_edges": Recipe(ds_cnn, SOUND, Settings(edges="uint8")),
    "ds_cnn_one_scale": Recipe(ds_cnn, SOUND, Settings(per_channel=False)),
    "ds_cnn_int16": Recipe(ds_cnn, SOUND, Settings(edges="int16", wide=True)),
    "autoencoder": Recipe(autoencoder, (64,)),
    "lenet": Recipe(lenet, (20, 20, 1)),
    "sine": Recipe(sine, (1,)),
    "lenet_one_image": Recipe(lenet, (20, 20, 1), Settings(batch=1)),
    "gestures": Recipe(gestures, (32, 3)),
    "gated": Recipe(gated, (16, 16, 3)),
    "dilated": Recipe(dilated, (16, 16, 3), Settings(batch=1)),
    "dilated_free_batch": Recipe(dilated, (16, 16, 3)),
    "bottlenecks": Recipe(bottlenecks, IMAGE),
    "mobilenet_v2": Recipe(mobilenet_v2, (96, 96, 3)),
    "upsampled": Recipe(upsampled, (8, 8, 1)),
}


def built(name: str) -> bytes:
    """The file of a recipe."""
    recipe = RECIPES[name]
    keras.utils.set_random_seed(sum(name.encode()))
    source = keras.Input(recipe.shape, batch_size=recipe.settings.batch)
    model = keras.Model(source, recipe.network(source))
    rng = np.random.default_rng(0)
    samples = smooth(rng, recipe.shape)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    if recipe.settings.batch is None:
        model(samples, training=True)
    return converted(model, samples, recipe.settings)


def smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Samples in 0..1 whose neighbours are alike."""
    values = rng.normal(size=(SAMPLES, *shape))
    for axis in range(1, len(shape)):
        for _ in range(3):
            values = values + np.roll(values, 1, axis)
    low, high = values.min(), values.max()
    return ((values - low) / (high - low)).astype(np.float32)


def converted(model: keras.Model, samples: np.ndarray, settings: Settings) -> bytes:
    """A full-integer file."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    builtins = tf.lite.OpsSet.TFLITE_BUILTINS_INT8
    if settings.wide:
        builtins = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
    converter.target_spec.supported_ops = [builtins]
    kind = getattr(tf, settings.edges)
    converter.inference_input_type = converter.inference_output_type = kind
    converter._experimental_disable_per_channel = not settings.per_channel  # noqa: SLF001

    def few() -> Iterator[list[np.ndarray]]:
        for sample in samples:
            yield [sample[None]]

    converter.representative_dataset = few
    return converter.convert()


def main(folder: str, *names: str) -> None:
    """Write the models of these names, or all."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name in names or RECIPES:
        content = built(name)
        (target / f"{name}.tflite").write_bytes(content)
        print(f"{name}: {len(content):,} bytes", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
