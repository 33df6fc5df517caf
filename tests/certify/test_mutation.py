from __future__ import annotations
import numpy as np
import pytest
from tests.certificates import checked, encoded
from tests.certify.mutations import FAULTS, SCENES, scene, steady
from cactus_edge.certificate_stream import Certificate


def problems(name: str, claim: Certificate) -> tuple[str, ...]:
    """What the checker says about a certificate of a scene."""
    made = scene(name)
    return checked(encoded(claim.head, claim.samples), made.model, made.data).problems


@pytest.fixture(scope="module")
def honest():
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        return {name: scene(name).certificate() for name in SCENES}


@pytest.mark.parametrize("name", SCENES, ids=str)
def test_without_a_mutation_certificates_are_accepted(honest, name: str) -> None:
    assert problems(name, honest[name]) == ()


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_faults_of_the_certifier_are_rejected(fault: str) -> None:
    broken = FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        broken.patch(patch)
        claim = scene(broken.scene).certificate()
    found = problems(broken.scene, claim)
    assert any(broken.words in problem for problem in found), found
