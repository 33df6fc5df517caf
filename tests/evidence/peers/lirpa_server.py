"""Answers questions with auto_LiRPA; runs in the peer's own environment, never in ours.

One JSON request a line on standard input, one JSON answer a line on standard output:
``{"load": path}`` reads a network and boxes; ``{"sample": i, "method": name}`` bounds the lead of
the label over its strongest rival on box i, or says why the method is ``unavailable``;
``{"sample": i, "method": "forward"}`` runs the float network on points of box i. Only the call that
computes the bounds is timed.

auto_LiRPA 0.3 was written for torch below 1.13. It reads a traced graph through two names that
newer versions of torch dropped; ``supply_missing_names`` puts them back. No bound depends on them.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.onnx.symbolic_helper as symbolic_helper
from torch import nn


def supply_missing_names() -> list[str]:
    """The setter of the exporter's opset version and subscripts of traced nodes."""
    supplied: list[str] = []
    if not hasattr(symbolic_helper, "_set_opset_version"):
        from torch.onnx._internal.torchscript_exporter._globals import GLOBALS

        def set_opset_version(version: int) -> None:
            GLOBALS.export_onnx_opset_version = version

        symbolic_helper._set_opset_version = set_opset_version
        supplied.append("torch.onnx.symbolic_helper._set_opset_version")
    if not hasattr(torch._C.Node, "__getitem__"):
        torch._C.Node.__getitem__ = lambda node, key: getattr(node, node.kindOf(key))(key)
        supplied.append("torch._C.Node.__getitem__")
    return supplied


SUPPLIED = supply_missing_names()

from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm  # noqa: E402

POINTS = 16


class Network(nn.Module):
    """The exported nodes; what an operator reads is looked up by the index of its tensor."""

    def __init__(self, head: dict[str, Any], arrays: Any) -> None:
        super().__init__()
        self.head = head
        self.layers = nn.ModuleDict()
        for node in head["nodes"]:
            if "name" in node:
                self.layers[node["name"]] = self._layer(node, arrays)

    @staticmethod
    def _layer(node: dict[str, Any], arrays: Any) -> nn.Module:
        weight, bias = (torch.from_numpy(arrays[f"{node['name']}.{p}"]) for p in ("weight", "bias"))
        if node["kind"] == "dense":
            layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
        else:
            layer = nn.Conv2d(
                weight.shape[1] * node["groups"],
                weight.shape[0],
                tuple(weight.shape[2:]),
                stride=tuple(node["stride"]),
                padding=tuple(node["padding"]),
                groups=node["groups"],
            )
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = {self.head["input"]: x}
        for node in self.head["nodes"]:
            read = [values[i] for i in node["inputs"]]
            if node["kind"] == "flatten":
                values[node["output"]] = torch.flatten(read[0], 1)
                continue
            y = read[0] + read[1] if node["kind"] == "add" else self.layers[node["name"]](read[0])
            values[node["output"]] = torch.relu(y) if node["relu"] else y
        return values[self.head["output"]]


class Server:
    """One loaded network with its boxes."""

    def __init__(self, path: str) -> None:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
        head = json.loads(arrays["head"].tobytes())
        self.lower, self.upper = (torch.from_numpy(arrays[n]) for n in ("lower", "upper"))
        self.labels = arrays["labels"].tolist()
        self.network = Network(head, arrays).eval()
        self.bounded = BoundedModule(self.network, torch.empty_like(self.lower[:1]))
        self.bounded.eval()
        self.classes = self.network(self.lower[:1]).shape[1]

    def _differences(self, label: int) -> torch.Tensor:
        """[1, rivals, classes]: the label's logit less each rival's."""
        identity = torch.eye(self.classes)
        rivals = [j for j in range(self.classes) if j != label]
        return (identity[label] - identity[rivals])[None]

    def bound(self, sample: int, method: str) -> dict[str, Any]:
        lower, upper = self.lower[sample : sample + 1], self.upper[sample : sample + 1]
        matrix = self._differences(self.labels[sample])
        started = time.perf_counter()
        ball = PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper)
        box = BoundedTensor((lower + upper) / 2, ball)
        try:
            least, _ = self.bounded.compute_bounds(
                x=(box,), C=matrix, method=method, bound_upper=False
            )
        except RuntimeError as error:
            # Without an unstable ReLU alpha-CROWN has no parameter, and its optimizer says so.
            if "does not require grad" not in str(error):
                raise
            return {"unavailable": "nothing to optimize"}
        seconds = time.perf_counter() - started
        return {"margin": float(least.min()), "seconds": seconds}

    @torch.no_grad()
    def run(self, sample: int) -> dict[str, Any]:
        """Logits of the box's middle, and the least margin over random corners and the middle."""
        lower, upper = self.lower[sample : sample + 1], self.upper[sample : sample + 1]
        generator = torch.Generator().manual_seed(sample)
        size = (POINTS, *lower.shape[1:])
        corners = torch.where(torch.rand(size, generator=generator) < 0.5, lower, upper)
        logits = self.network(torch.cat([(lower + upper) / 2, corners]))
        margins = logits @ self._differences(self.labels[sample])[0].T
        return {"logits": logits[0].tolist(), "margin": float(margins.min())}


def main() -> None:
    """Serve until the input ends; whatever else prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    server: Server | None = None
    for line in io.TextIOWrapper(sys.stdin.buffer):
        request = json.loads(line)
        if "load" in request:
            server = Server(request["load"])
            answer: dict[str, Any] = {"torch": torch.__version__, "supplied": SUPPLIED}
        else:
            assert server is not None, "nothing is loaded"
            sample, method = request["sample"], request["method"]
            answer = server.run(sample) if method == "forward" else server.bound(sample, method)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
