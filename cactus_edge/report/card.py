"""A model card in the form of the Hugging Face Hub: Markdown behind a head of YAML.

Nothing but what the files say: no license, no intended use, no praise. The same files make the same
bytes. Reference: https://huggingface.co/docs/hub/model-cards (``model-index`` for the figures).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import cactus_edge
from cactus_edge.certificate import SIDE_CONDITIONS, VERDICTS
from cactus_edge.errors import counted
from cactus_edge.graph import Linear
from cactus_edge.report.page import certified_text, percent, radius_text
from cactus_edge.report.sizes import sizes
from cactus_edge.report.sources import Claim, Model, Sources

_TAGS = ("tflite", "quantized", "certified-robustness")


def card(sources: Sources) -> bytes:
    """The card of the model that ``sources`` are about."""
    claim = sources.main
    names = ", ".join(model.file for model in claim.head.models)
    parts = [
        f"# {_plain(names)}",
        "An integer model in TensorFlow Lite's format, with a certificate: for each sample that is "
        "counted as certified the decision is proved for every input of the stated set, in the "
        "integers that the named runtimes compute.",
        *_claimed(claim),
        *_files(sources.models, claim),
        *_layers(sources.models),
        *_sizes(sources),
        *_runtimes(sources),
        "## Check it",
        f"`{_plain(claim.head.how_to_check)}` derives every line of the certificate anew. Side "
        f"conditions: {'; '.join(SIDE_CONDITIONS)}.",
        f"Written by cactus-edge {cactus_edge.__version__} from the files above; it states nothing "
        "else.",
    ]
    body = "\n\n".join(parts)
    return f"---\n{_yaml(_head(sources))}\n---\n\n{body}\n".encode()


def _head(sources: Sources) -> dict[str, object]:
    """The YAML head, as plain values."""
    claim, summary = sources.main, sources.main.summary
    data = claim.head.data
    head: dict[str, object] = {"tags": list(_TAGS)}
    if data is None:
        return head
    what = claim.head.property
    certified = certified_text(what)
    certified += "" if what.kind == "radius" else f", {radius_text(what)}"
    metrics: list[dict[str, object]] = [
        {"type": "accuracy", "name": "standard accuracy", "value": summary.standard_accuracy},
        {
            "type": "accuracy",
            "name": certified,
            "value": summary.certified_accuracy,
        },
    ]
    source = {"name": data.name, "type": data.name, "split": data.split}
    result = {"task": {"type": "other", "name": "classification"}, "dataset": source}
    model = {"name": claim.head.models[0].file, "results": [{**result, "metrics": metrics}]}
    return {**head, "datasets": [data.name], "model-index": [model]}


def _yaml(values: dict[str, object]) -> str:
    """JSON is YAML; a key a line, with every character outside ASCII escaped."""
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items())


def _claimed(claim: Claim) -> Iterator[str]:
    head, summary = claim.head, claim.summary
    total = sum(summary.verdicts.values())
    yield "## What is certified"
    data = head.data
    rows: list[tuple[object, ...]] = [
        ("inputs", radius_text(head.property)),
        ("decision", head.property.decision or "that of the query"),
        ("method", head.verifier),
        ("samples", total),
    ]
    if data is not None:
        last = data.first + data.count - 1
        rows.append(("data", f"{data.name}, {data.split}, samples {data.first} to {last}"))
        rows.append(("data, SHA-256", data.sha256))
        rows.append(("standard accuracy", percent(summary.standard_accuracy)))
        rows.append((certified_text(head.property), percent(summary.certified_accuracy)))
        if summary.attack_accuracy is not None:
            rows.append(("accuracy under attack", percent(summary.attack_accuracy)))
    if head.query is not None:
        rows.append(("query", f"{head.query.file}, SHA-256 {head.query.sha256}"))
    rows += [(f"verdict {name}", summary.verdicts.get(name, 0)) for name in VERDICTS]
    yield _table(("", ""), rows)
    for model, arithmetic in zip(head.models, head.arithmetic, strict=True):
        held = ", ".join(arithmetic.profiles)
        meaning = {
            "universal": "all of them compute the same integers",
            "conjunction": "a verdict holds under each",
        }[arithmetic.rounding]
        yield f"{_plain(model.file)} holds on runtimes with the profiles {held}: {meaning}."
        if arithmetic.uncovered:
            yield _table(("no claim about", "because"), sorted(arithmetic.uncovered.items()))


def _files(models: Sequence[Model], claim: Claim) -> Iterator[str]:
    yield "## Files"
    rows = [(m.file, m.bytes, m.sha256) for m in claim.head.models]
    total = sum(claim.summary.verdicts.values())
    rows.append(
        (f"{claim.path.name} ({counted(total, 'sample')})", claim.path.stat().st_size, claim.sha256)
    )
    yield _table(("file", "bytes", "SHA-256"), rows)


def _layers(models: Sequence[Model]) -> Iterator[str]:
    """Widths and zeros of the weights, where the models themselves were given."""
    for model in models:
        rows: list[tuple[object, ...]] = []
        for op in model.graph.operators:
            if isinstance(op, Linear):
                values = op.weights.values
                zeros = int((values == 0).sum())
                rows.append((op.name, op.kind, values.size, op.weights.bits, zeros))
        source = model.graph.tensors[model.graph.input]
        yield f"## Layers of {_plain(model.path.name)}"
        yield f"The input is {source.dtype.name.lower()} {list(source.shape)}."
        yield _table(("layer", "operator", "weights", "bits", "of them 0"), rows)


def _sizes(sources: Sources) -> Iterator[str]:
    """What ships beside what the same layers take otherwise."""
    for one in sizes(sources):
        yield f"## Size of {_plain(one.model)}"
        rows = [(size.form, size.bytes, f"{size.share:.2f}") for size in one.forms]
        yield _table(("form", "bytes", "times the file"), rows)


def _runtimes(sources: Sources) -> Iterator[str]:
    """What ``validate`` and ``bench`` have measured, where their results were given."""
    for found in sources.validations:
        rows = [
            (peer.name, peer.version, peer.profile, peer.status, peer.elements, peer.mismatches)
            for peer in found.peers
        ]
        yield "## Compared with runtimes"
        yield _table(("runtime", "version", "profile", "result", "elements", "mismatches"), rows)
    for bench in sources.benches:
        yield f"## Speed on {_plain(bench.machine)}"
        peers = [("cactus_edge", bench.ours), *bench.peers.items()]
        figures = [(n, f.version, f"{f.median_us:.1f}", f.differing) for n, f in peers]
        yield _table(("runtime", "version", "median, us an image", "outputs that differ"), figures)


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_plain(str(cell)) for cell in row) + " |" for row in lines)


def _plain(text: str) -> str:
    """On one line, with nothing that Markdown or HTML would take for its own."""
    line = " ".join(text.split())
    return "".join(f"\\{c}" if c in r"\`*_[]<>|#&" else c for c in line)
