"""Files that are wrong in one place: each is refused with one line that names the place."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import random_graph

from cactus_edge.errors import (
    InvalidGraphError,
    MalformedModelError,
    UnsupportedModelError,
)
from cactus_edge.execute import execute
from cactus_edge.flatbuffer import read_tflite, storable, wire, write_tflite
from cactus_edge.flatbuffer.writer import model_values
from cactus_edge.graph import Linear
from tests.flatbuffer_edits import (
    Edit,
    Tree,
    behind,
    check,
    code,
    data_of,
    drop,
    edited,
    float_bits,
    index_of,
    model,
    operator,
    options,
    put,
    quantized,
    sample,
    subgraph,
    tensor,
    thaw,
)

INPUTS = {
    "no activation": ([-1, index_of("pad/paddings")], "operator 0 (PAD): tensor -1 does not exist"),
    "beyond": ([99, index_of("pad/paddings")], "tensor 99 does not exist, there are"),
    "constant": (
        [index_of("logits/bias"), index_of("pad/paddings")],
        "'logits/bias', a constant",
    ),
    "none": ([], "operator 0 (PAD): has 0 inputs and 1 outputs"),
    "too few": ([0], "operator 0 (PAD): has 1 inputs instead of 2"),
    "too many": ([0, index_of("pad/paddings"), index_of("pad/paddings")], "has 3 inputs instead"),
    "left out": ([0, -1], "operator 0 (PAD): has no constant tensor of paddings"),
    "dynamic": ([0, 0], "operator 0 (PAD): input 1 is tensor 0 'input', which has no data"),
    "wrong type": ([0, index_of("logits/weight")], "paddings is INT8; only INT32"),
}

MALFORMED: dict[str, tuple[Edit, str]] = {
    "version": (put(model, version=2), "m: schema version 2"),
    "no buffers": (drop(model, "buffers"), "buffer 0 is missing or not empty"),
    "buffer 0": (lambda t: t["buffers"][0].update(data=b"x"), "buffer 0 is missing or not empty"),
    "buffer index": (put(tensor("logits/bias"), buffer=99), "'logits/bias': buffer 99 does not"),
    "metadata buffer": (
        lambda t: t["metadata"][0].update(buffer=99),
        "entry 0: buffer 99",
    ),
    "data size": (
        data_of("logits/bias", b"12345678"),
        "8 bytes of data instead of 12 for INT32",
    ),
    "int4 size": (data_of("depthwise/weight", b"12345"), "5 bytes of data instead of 6 for INT4"),
    "huge shape": (
        put(tensor("logits/weight"), shape=[2**31 - 1] * 8),
        "'logits/weight': 24 bytes of data instead of",
    ),
    "negative extent": (put(tensor("flat"), shape=[1, -8]), "'flat': shape [1, -8]"),
    "zero extent": (put(tensor("flat"), shape=[1, 0]), "'flat': shape [1, 0]"),
    "no shape": (drop(tensor("flat"), "shape"), "'flat': shape []"),
    "long shape": (put(tensor("flat"), shape=[1] * 99), "'flat': shape [1, 1"),
    "zero scale": (quantized("flat", scale=float_bits(0)), "'flat': scale 0.0 is not a positive"),
    "negative scale": (quantized("flat", scale=float_bits(-1)), "'flat': scale -1.0"),
    "nan scale": (quantized("flat", scale=float_bits(float("nan"))), "'flat': scale nan"),
    "infinite scale": (quantized("flat", scale=float_bits(float("inf"))), "'flat': scale inf"),
    "subnormal scale": (quantized("flat", scale=float_bits(1e-40)), "normal float32"),
    "scales and zero points": (quantized("flat", zero_point=[1, 2]), "1 scales, 2 zero points"),
    "zero point": (quantized("flat", zero_point=[2**40]), "zero points 1099511627776.."),
    "dimension": (quantized("flat", quantized_dimension=2), "quantized dimension 2 of a tensor"),
    "negative dimension": (quantized("flat", quantized_dimension=-1), "quantized dimension -1"),
    "weight scales": (
        quantized("convolution/weight", scale=float_bits(1, 1, 1), zero_point=[0, 0, 0]),
        "operator 1 (CONV_2D): 3 weight scales for 2 channels",
    ),
    "no weight scales": (
        drop(tensor("convolution/weight"), "quantization"),
        "operator 1 (CONV_2D): 0 weight scales for 2 channels",
    ),
    "weight rank": (
        put(tensor("convolution/weight"), shape=[2, 9, 2]),
        "operator 1 (CONV_2D): weights [2, 9, 2] must have 4 dimensions",
    ),
    "bias shape": (put(tensor("logits/bias"), shape=[1, 3]), "bias [1, 3] for 3 channels"),
    "bias zero point": (quantized("logits/bias", zero_point=[1]), "bias has a zero point"),
    "bias scale": (
        quantized("logits/bias", scale=float_bits(0.05 * 0.01 * 1.03)),
        "operator 6 (FULLY_CONNECTED): bias scale differs from input scale * weight scale",
    ),
    "bias scales": (drop(tensor("logits/bias"), "quantization"), "0 bias scales, 3 channels"),
    "opcode": (put(operator(3), opcode_index=77), "operator 3: operator code 77 does not exist"),
    "two codes": (
        put(code(0), deprecated_builtin_code=7),
        "two different operators, 7 and 34",
    ),
    "code version": (put(code(0), version=0), "operator code 0: operator version 0"),
    "keep dimensions": (
        lambda t: (
            put(options(6), keep_num_dims=True)(t),
            put(operator(6), inputs=[5, *operator(6)(t)["inputs"][1:]])(t),
        ),
        "(FULLY_CONNECTED): its output is [1, 3], not [1, 2, 1, 3]",
    ),
    "data in two places": (
        lambda t: t["buffers"][2].update(offset=77),
        "buffer 2: 0 bytes at offset 77 of ",
    ),
    "data behind the file": (behind(1 << 20), "bytes at offset 1048576 of "),
    "data without an offset": (
        lambda t: t["buffers"][2].update(size=7),
        "buffer 2: 7 bytes at no offset",
    ),
    "other options": (
        put(operator(1), builtin_options_type=12),
        "(CONV_2D): has options of another",
    ),
    "untyped options": (drop(operator(1), "builtin_options_type"), "has options of another"),
    "no options": (
        drop(operator(1), "builtin_options", "builtin_options_type"),
        "no Conv2DOptions",
    ),
    "empty options": (drop(operator(1), "builtin_options"), "(CONV_2D): has no Conv2DOptions"),
    "no activation": (drop(operator(3), "builtin_options"), "operator 3 (ADD): has no AddOptions"),
    "no outputs": (put(operator(4), outputs=[]), "(AVERAGE_POOL_2D): has 1 inputs and 0 outputs"),
    "stride": (put(options(1), stride_w=0), "stride_h 1 and stride_w 0 must be at least 1"),
    "dilation": (put(options(1), dilation_h_factor=-1), "dilation_h_factor -1"),
    "window": (put(options(4), filter_width=0), "filter_height 2 and filter_width 0"),
    "padding": (put(options(1), padding=2), "padding 2 is neither SAME nor VALID"),
    "activation": (put(options(1), fused_activation_function=9), "activation 9 does not exist"),
    "depth multiplier": (put(options(2), depth_multiplier=3), "depth_multiplier 3 takes input"),
    "negative paddings": (
        data_of("pad/paddings", np.array([0, 0, -1, 1, 0, 1, 0, 0], "<i4").tobytes()),
        "operator 0 (PAD): negative paddings",
    ),
    "paddings": (put(tensor("pad/paddings"), shape=[2, 4]), "paddings [2, 4] for 4 dimensions"),
    "new shape": (
        data_of("flat/shape", np.array([1, 9], "<i4").tobytes()),
        "operator 5 (RESHAPE): new shape [1, 9] is not the output's shape [1, 8]",
    ),
    "new shape option": (put(options(5), new_shape=[2, 4]), "new shape [2, 4] is not the output's"),
    "two free extents": (put(options(5), new_shape=[-1, -1]), "new shape [-1, -1] is not"),
    "shape of shape": (put(tensor("flat/shape"), shape=[1, 2]), "is a tensor [1, 2], not a list"),
    "no new shape": (
        lambda t: (put(operator(5), inputs=[5])(t), options(5)(t).clear()),
        "operator 5 (RESHAPE): has no new shape",
    ),
    "unprintable name": (put(tensor("flat"), name="a\nb"), "'name' holds characters"),
}

UNSUPPORTED: dict[str, tuple[Edit, str]] = {
    "two subgraphs": (lambda t: t["subgraphs"].append(t["subgraphs"][0]), "2 subgraphs"),
    "no subgraph": (put(model, subgraphs=[]), "0 subgraphs"),
    "two inputs": (put(subgraph, inputs=[0, 1]), "2 inputs; exactly one is supported"),
    "no output": (drop(subgraph, "outputs"), "0 outputs; exactly one"),
    "constant output": (put(subgraph, outputs=[9]), "the model's output is tensor 9"),
    "variable": (put(tensor("flat"), is_variable=True), "'flat': variable and external tensors"),
    "external": (put(tensor("flat"), external_buffer=3), "'flat': variable and external tensors"),
    "dynamic shape": (
        put(tensor("flat"), shape_signature=[1, -1]),
        "'flat': dynamic shape [1, -1]; only the batch",
    ),
    "int16 in between": (put(tensor("flat"), type=7), "the bias is INT32; only INT64"),
    "unknown type": (put(tensor("flat"), type=99), "'flat': tensor type 99 is unknown"),
    "int64 bias": (
        lambda t: (put(tensor("logits/bias"), type=4)(t), data_of("logits/bias", bytes(24))(t)),
        "operator 6 (FULLY_CONNECTED): the bias is INT64; only INT32 is supported",
    ),
    "int8 bias": (
        lambda t: (put(tensor("logits/bias"), type=9)(t), data_of("logits/bias", bytes(3))(t)),
        "operator 6 (FULLY_CONNECTED): the bias is INT8; only INT32 is supported",
    ),
    "per-channel activation": (
        quantized("flat", scale=float_bits(1, 1), zero_point=[0, 0]),
        "'flat': an activation with 2 scales",
    ),
    "no scale": (
        drop(tensor("depthwise"), "quantization"),
        "tensor 'depthwise': integer tensors need",
    ),
    "no input scale": (
        drop(tensor("flat"), "quantization"),
        "operator 6 (FULLY_CONNECTED): input 'flat' has no scale",
    ),
    "custom quantization": (quantized("flat", details_type=1), "'flat': custom quantization"),
    "weight zero point": (
        quantized("logits/weight", zero_point=[1]),
        "operator 6 (FULLY_CONNECTED): weights have a zero point other than 0",
    ),
    "dynamic weights": (
        put(operator(6), inputs=[6, 5, -1]),
        "input 1 is tensor 5 'pool', which has",
    ),
    "no weights": (put(operator(6), inputs=[6, -1, -1]), "its weights are not constant"),
    "float weights": (
        lambda t: (put(tensor("logits/weight"), type=0)(t), data_of("logits/weight", bytes(96))(t)),
        "'logits/weight': constants of type FLOAT32",
    ),
    "int32 weights": (put(operator(6), inputs=[6, index_of("logits/bias")]), "weights are INT32"),
    "int4 per channel": (
        lambda t: (
            put(tensor("logits/weight"), type=17)(t),
            data_of("logits/weight", bytes(12))(t),
            quantized("logits/weight", scale=float_bits(1, 1, 1), zero_point=[0, 0, 0])(t),
            put(operator(6), inputs=[6, index_of("logits/weight")])(t),
        ),
        "operator 6 (FULLY_CONNECTED 'logits'): int4 weights with a scale for each channel",
    ),
    "tanh": (
        put(options(3), fused_activation_function=4),
        "operator 3 (ADD): fused TANH; supported: NONE, RELU, RELU6",
    ),
    "operator": (
        put(code(0), builtin_code=42, deprecated_builtin_code=42),
        "operator 0: operator DIV is not supported; supported: CONV_2D, DEPTHWISE_CONV_2D",
    ),
    "unknown operator": (
        put(code(0), builtin_code=999, deprecated_builtin_code=127),
        "operator of code 999 is not supported",
    ),
    "custom": (
        put(code(0), builtin_code=32, deprecated_builtin_code=32, custom_code="Mine"),
        "operator 0: operator CUSTOM 'Mine' is not supported",
    ),
    "version": (put(code(6), version=15), "operator 6: version 15 of FULLY_CONNECTED is not"),
    "divergent version": (put(code(6), version=8), "write version 4"),
    "custom options": (put(operator(3), custom_options=b"x"), "operator 3 (ADD): custom options"),
    "large options": (put(operator(3), large_custom_options_size=5), "(ADD): custom options"),
    "intermediates": (put(operator(3), intermediates=[1]), "operator 3 (ADD): custom options"),
    "variables": (put(operator(3), mutating_variable_inputs=[1]), "(ADD): custom options"),
    "weights format": (put(options(6), weights_format=1), "(FULLY_CONNECTED): shuffled weights"),
    "asymmetric": (put(options(6), asymmetric_quantize_inputs=True), "asymmetric_quantize_inputs"),
    "bias type": (put(options(6), quantized_bias_type=4), "quantized_bias_type INT64"),
    "beta": (put(options(7), beta=0x40000000), "operator 7 (SOFTMAX): beta other than 1"),
    "dynamic new shape": (put(operator(5), inputs=[5, -1]), "its new shape is not constant"),
    "memory plan": (
        lambda t: t["metadata"][0].update(name="OfflineMemoryAllocation"),
        "metadata entry 'OfflineMemoryAllocation'",
    ),
    "reshape read twice": (
        lambda t: (
            put(operator(6), inputs=[5, *operator(6)(t)["inputs"][1:]])(t),
            put(subgraph, outputs=operator(5)(t)["outputs"])(t),
        ),
        "RESHAPE 'flat'): its input is used elsewhere",
    ),
}

INVALID: dict[str, tuple[Edit, str]] = {
    "twice": (put(operator(4), outputs=[4]), "operator 4 (AVERAGE_POOL_2D 'sum'): tensor 'sum'"),
    "cycle": (
        put(operator(3), inputs=[4, 4]),
        "(ADD 'sum'): input 'sum' is not computed",
    ),
    "shape": (put(tensor("pool"), shape=[1, 2, 2, 2]), "operator 4 (AVERAGE_POOL_2D 'pool')"),
    "quantization": (quantized("pool", zero_point=[3]), "'sum' and 'pool' differ"),
    "zero point of an int8": (
        lambda t: [quantized(n, zero_point=[200])(t) for n in ("sum", "pool", "flat")],
        "zero point 200 is outside int8",
    ),
    "batch": (
        put(tensor("input"), shape=[2, 4, 4, 2]),
        "tensor 'input' has shape [2, 4, 4, 2]",
    ),
    "softmax scale": (quantized("softmax", zero_point=[0]), "operator 7 (SOFTMAX 'softmax')"),
    "accumulator": (
        data_of("logits/bias", np.array([2**30] * 3, "<i4").tobytes()),
        "operator 6 (FULLY_CONNECTED 'logits'): No accumulator can reach 2^27",
    ),
    "float inside": (
        lambda t: (put(tensor("input"), type=0)(t), drop(tensor("input"), "quantization")(t)),
        "'input' is float32; only a QUANTIZE",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str) -> None:
    edit, text = MALFORMED[case]
    check(edited(edit), MalformedModelError, text)


def test_data_may_lie_behind_the_flatbuffer() -> None:
    """As in files beyond 2 GiB; LiteRT reads them too."""
    tree = thaw(model_values(sample()))
    data = bytes(tree["buffers"][2]["data"])
    wanted = read_tflite(wire.serialize(tree), "m").fingerprint()
    behind(1 << 20)(tree)
    size = -(-len(wire.serialize(tree)) // 16) * 16
    tree["buffers"][2]["offset"] = size
    whole = wire.serialize(tree).ljust(size, b"\0") + data
    assert read_tflite(whole, "m").fingerprint() == wanted
    with pytest.raises(MalformedModelError, match=f"bytes at offset {size} of {len(whole) - 1}"):
        read_tflite(whole[:-1], "m")
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    litert.Interpreter(model_content=whole).allocate_tensors()


@pytest.mark.parametrize(
    ("name", "dimension", "text"),
    [
        ("convolution", 3, "operator 1 (CONV_2D): weights are quantized along dimension 3, not 0"),
        ("depthwise", 0, "operator 2 (DEPTHWISE_CONV_2D): weights are quantized along dimension 0"),
    ],
)
def test_a_wrong_dimension_of_scales_is_read_with_a_warning(
    caplog: pytest.LogCaptureFixture, name: str, dimension: int, text: str
) -> None:
    """What TFLite Micro takes and the others refuse; the number of scales says what is meant."""
    wanted = read_tflite(edited(lambda tree: None), "m").fingerprint()
    assert caplog.messages == []
    data = edited(quantized(f"{name}/weight", quantized_dimension=dimension))
    assert read_tflite(data, "m").fingerprint() == wanted
    assert len(caplog.messages) == 1 and text in caplog.messages[0]


@pytest.mark.parametrize(
    ("number", "left_out", "text"),
    [
        (1, [], "operator 1 (CONV_2D): has no bias; read as one of zeros"),
        (1, [-1], "operator 1 (CONV_2D): has no bias; read as one of zeros"),
        (2, [], "operator 2 (DEPTHWISE_CONV_2D): has no bias; read as one of zeros"),
        (6, [-1], ""),
    ],
)
def test_a_bias_that_is_left_out_is_zero_and_warned_of(
    caplog: pytest.LogCaptureFixture, number: int, left_out: list[int], text: str
) -> None:
    """TFLite and LiteRT refuse such convolutions, and XNNPACK crashes on some."""

    def edit(tree: Tree) -> None:
        node = operator(number)(tree)
        node["inputs"] = np.array([*list(node["inputs"])[:2], *left_out], np.int32)

    layer = read_tflite(edited(edit), "m").operators[number]
    assert isinstance(layer, Linear) and not layer.bias.any() and layer.bias.dtype == np.int32
    assert [text in message for message in caplog.messages] == [True] * bool(text)


@pytest.mark.parametrize("case", INPUTS)
def test_wrong_inputs(case: str) -> None:
    inputs, text = INPUTS[case]
    data = edited(put(operator(0), inputs=inputs))
    with pytest.raises(UnsupportedModelError) as caught:
        read_tflite(data, "m")
    assert text in str(caught.value)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(case: str) -> None:
    edit, text = UNSUPPORTED[case]
    check(edited(edit), UnsupportedModelError, text)


@pytest.mark.parametrize("case", INVALID)
def test_invalid(case: str) -> None:
    edit, text = INVALID[case]
    check(edited(edit), InvalidGraphError, text)


# ------------------------------------------------------------------------ what is accepted
ACCEPTED: dict[str, Edit] = {
    "free batch": put(tensor("input"), shape_signature=[-1, 4, 4, 2]),
    "same signature": put(tensor("input"), shape_signature=[1, 4, 4, 2]),
    "free extent": put(options(5), new_shape=[1, -1]),
    "free batch extent": put(options(5), new_shape=[-1, 8]),
    "shape from options alone": put(operator(5), inputs=[5]),
    "shape from a tensor alone": drop(operator(5), "builtin_options", "builtin_options_type"),
    "old codes": lambda t: [c.pop("builtin_code") for c in t["operator_codes"]],
    "new codes": lambda t: [c.pop("deprecated_builtin_code") for c in t["operator_codes"]],
    "newer versions": lambda t: [
        c.update(version=v)
        for c, v in zip(t["operator_codes"], (6, 8, 7, 6, 3, 1, 14, 4), strict=True)
    ],
    "kept dimensions of 2": put(options(6), keep_num_dims=True),
    "int32 bias type": put(options(6), quantized_bias_type=2),
    "bias scale within 2 %": quantized("logits/bias", scale=float_bits(0.05 * 0.01 * 1.019)),
    "unused code": lambda t: t["operator_codes"].append({"builtin_code": 40}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_equivalent_files_are_the_same_graph(case: str) -> None:
    data = edited(ACCEPTED[case])
    assert data != write_tflite(sample())
    assert read_tflite(data).fingerprint() == sample().fingerprint()


@pytest.mark.parametrize(
    "inputs", [[6, index_of("logits/weight"), -1], [6, index_of("logits/weight")]]
)
def test_an_absent_bias_is_zero(inputs: list[int]) -> None:
    graph = read_tflite(edited(put(operator(6), inputs=inputs)))
    assert graph.operators[6].bias.tolist() == [0, 0, 0]


def test_widths_of_weights_are_checked() -> None:
    graph = random_graph(np.random.default_rng(2), bits=(3,))
    tree = thaw(model_values(graph))
    entry = next(m for m in tree["metadata"] if m["name"] == storable.BITS_ENTRY)
    widths = tree["buffers"][entry["buffer"]]["data"]
    assert set(widths) == {3}
    for wrong in (b"", widths + b"\3", b"\1" * len(widths), b"\6" * len(widths)):
        tree["buffers"][entry["buffer"]]["data"] = wrong
        with pytest.raises(MalformedModelError, match=storable.BITS_ENTRY):
            read_tflite(wire.serialize(tree))
    tree["buffers"][entry["buffer"]]["data"] = b"\2" * len(widths)
    with pytest.raises(InvalidGraphError, match="in 2 bits"):
        read_tflite(wire.serialize(tree))
    tree["buffers"][entry["buffer"]]["data"] = widths
    tree["metadata"].append(entry)
    with pytest.raises(MalformedModelError, match="must hold one byte for each"):
        read_tflite(wire.serialize(tree))


def test_what_is_read_computes_what_was_written() -> None:
    graph = read_tflite(write_tflite(sample()))
    batch = np.random.default_rng(3).integers(-128, 128, (50, 4, 4, 2))
    assert np.array_equal(execute(graph, batch), execute(sample(), batch))
