"""A bill of materials of a certified model: CycloneDX 1.6, as JSON.

Components are the models, the certificate and the data that it names, each by its SHA-256. There is
no time and no random number in it: the same files make the same bytes. The library has no class for
``modelCard``, so that part is put in behind it; the tests validate the whole against the schema.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import cactus_edge
from cactus_edge.errors import MissingExtraError, counted
from cactus_edge.report.page import certified_text, radius_text
from cactus_edge.report.sources import Claim, Sources

_SPACE = uuid.UUID("9f2c6d0e-7a51-4b0e-8d0b-6b9a5b0c1e77")
"""Of serial numbers; the rest of them follows from the certificate's hash."""
_CLAIM = "certificate"


def bill_of_materials(sources: Sources) -> bytes:
    """The bill of the model that ``sources`` are about.

    Raises:
        MissingExtraError: cyclonedx-python-lib is not installed.
    """
    try:
        from cyclonedx import model as library
        from cyclonedx.model import bom as bills
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError:
        raise MissingExtraError("cyclonedx-python-lib", "report", "a bill of materials") from None
    claim = sources.main
    # The library's decorator hides the types of its classes.
    new_component: Any = Component
    new_hash: Any = library.HashType
    new_property: Any = library.Property
    new_bom: Any = bills.Bom

    def component(kind: ComponentType, name: str, sha256: str, reference: str) -> Any:
        digest = new_hash(alg=library.HashAlgorithm.SHA_256, content=sha256)
        return new_component(type=kind, name=name, hashes=[digest], bom_ref=reference)

    bom = new_bom(serial_number=uuid.uuid5(_SPACE, claim.sha256))
    bom.metadata.tools.components.add(
        new_component(
            type=ComponentType.APPLICATION, name="cactus-edge", version=cactus_edge.__version__
        )
    )
    certificate = component(ComponentType.DATA, claim.path.name, claim.sha256, _CLAIM)
    bom.components.add(certificate)
    data = claim.head.data
    if data is not None:
        name = f"{data.name} ({data.split})"
        bom.components.add(component(ComponentType.DATA, name, data.sha256, "data"))
    for number, (model, arithmetic) in enumerate(
        zip(claim.head.models, claim.head.arithmetic, strict=True)
    ):
        kind = ComponentType.MACHINE_LEARNING_MODEL
        made = component(kind, model.file, model.sha256, f"model-{number}")
        for key, value in (
            ("bytes", str(model.bytes)),
            ("fingerprint", model.fingerprint),
            ("rounding", arithmetic.rounding),
            ("profiles", " ".join(arithmetic.profiles)),
        ):
            made.properties.add(new_property(name=f"cactus_edge:{key}", value=value))
        bom.components.add(made)
        bom.register_dependency(certificate, [made])
    document: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    document["metadata"].pop("timestamp", None)
    for entry in document["components"]:
        if entry["type"] == "machine-learning-model":
            entry["modelCard"] = _model_card(claim)
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def _model_card(claim: Claim) -> dict[str, Any]:
    """What the certificate says of its models, in CycloneDX's words."""
    summary, data = claim.summary, claim.head.data
    parameters: dict[str, Any] = {"task": "classification"}
    found: dict[str, Any] = {"modelParameters": parameters}
    if data is not None:
        parameters["datasets"] = [{"ref": "data"}]
        measured = [("standard accuracy", summary.standard_accuracy)]
        measured.append((certified_text(claim.head.property), summary.certified_accuracy))
        if summary.attack_accuracy is not None:
            measured.append(("accuracy under attack", summary.attack_accuracy))
        where = f"{counted(data.count, 'sample')}; {radius_text(claim.head.property)}"
        found["quantitativeAnalysis"] = {
            "performanceMetrics": [
                {"type": name, "value": repr(value), "slice": where} for name, value in measured
            ]
        }
    return found
