"""Signatures: what was signed is found intact, and nothing else is."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from msgspec.structs import replace

from cactus_edge import datasets, flatbuffer, signing
from cactus_edge.cli import run
from cactus_edge.errors import DataError, PropertyNotMetError
from cactus_edge.signing import Evidence
from tests.test_cli import call, digits_graph

SAMPLES = 3
QUERY = "\n".join(
    [
        *(f"(declare-const X_{i} Real)" for i in range(64)),
        *(f"(declare-const Y_{i} Real)" for i in range(10)),
        *(f"(assert (>= X_{i} 0.5)) (assert (<= X_{i} 0.5))" for i in range(64)),
        "(assert (<= Y_0 -1000.0))",
    ]
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its data, their certificate, a key and a signature by the verbs."""
    folder = tmp_path_factory.mktemp("signed")
    flatbuffer.save(digits_graph(), folder / "model.tflite")
    flatbuffer.save(digits_graph(1), folder / "other.tflite")
    digits = datasets.load("digits", "test")
    images, labels = digits.images[:SAMPLES], np.arange(SAMPLES)
    for name, x in (("data", images), ("changed", 255 - images)):
        parts = {"x_train": x, "y_train": labels, "x_test": x, "y_test": labels}
        np.savez_compressed(folder / f"{name}.npz", **parts)
    claim = ("--data", folder / "data.npz", "--levels", 1, "-o", folder / "certificate.jsonl")
    ok("certify", folder / "model.tflite", *claim)
    (folder / "recipe.toml").write_text("seed = 1\n")
    ok("sign", "--new-key", folder / "key.pem")
    ok(*signed(folder, "-o", folder / "signature.json"))
    return folder


def ok(*arguments: object) -> None:
    assert run([str(a) for a in arguments]) == 0


def signed(folder: Path, *more: object) -> list[object]:
    known = ["--certificate", folder / "certificate.jsonl", "--data", folder / "data.npz"]
    known += ["--with", folder / "recipe.toml", "--key", folder / "key.pem"]
    return ["sign", folder / "model.tflite", *known, *more]


def verified(folder: Path, *more: object) -> list[object]:
    key = folder / "key.pub.pem"
    return ["verify-signature", folder / "signature.json", "--key", key, *more]


def key_of(folder: Path) -> ed25519.Ed25519PublicKey:
    return signing.public_key(folder / "key.pub.pem")


def flips(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Every byte with one of its bits changed, each bit in turn."""
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        yield position, bytes(changed)


def test_what_was_signed_is_intact(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, *verified(made, "--data", made / "data.npz", "--json"))
    shown = json.loads(out)
    assert (code, shown["intact"], shown["data_compared"]) == (0, True, True)
    signed_files = {"model.tflite", "certificate.jsonl", "recipe.toml"}
    assert set(shown["files"]) == signed_files
    code, out, _ = call(capsys, *verified(made))
    assert code == 0 and "not compared" in out
    assert stat.S_IMODE((made / "key.pem").stat().st_mode) == 0o600
    again = made / "again.json"
    ok(*signed(made, "-o", again))
    assert again.read_bytes() == (made / "signature.json").read_bytes()
    again.unlink()


def test_the_envelope_is_dsse_over_an_in_toto_statement(made: Path) -> None:
    """Read and verified as the two standards say, without our code."""
    envelope = json.loads((made / "signature.json").read_bytes())
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    key = load_pem_public_key((made / "key.pub.pem").read_bytes())
    assert isinstance(key, ed25519.Ed25519PublicKey)
    encoded = b" ".join(
        [b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload]
    )
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), encoded)
    statement = json.loads(payload)
    assert kind == b"application/vnd.in-toto+json"
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert {len(subject["digest"]["sha256"]) for subject in statement["subject"]} == {64}


@pytest.mark.parametrize("name", ["model.tflite", "certificate.jsonl", "recipe.toml"])
def test_any_changed_byte_of_a_file_is_found(made: Path, name: str, tmp_path: Path) -> None:
    statement = signing.opened((made / "signature.json").read_bytes(), key_of(made), "it")
    for subject in statement.subject:
        (tmp_path / subject.name).write_bytes((made / subject.name).read_bytes())
    content = (made / name).read_bytes()
    changed = [*flips(content), (len(content), content + b"\0"), (0, content[:-1]), (0, b"")]
    assert len(changed) > len(content) > 0
    for position, other in changed:
        (tmp_path / name).write_bytes(other)
        assert any(name in problem for problem in found(statement, tmp_path)), position
    (tmp_path / name).write_bytes(content)
    assert found(statement, tmp_path) == []


def found(statement: signing.Statement, folder: Path) -> list[str]:
    return list(signing.problems(statement, folder, Evidence()))


def test_any_changed_byte_of_the_data_is_found(made: Path, tmp_path: Path) -> None:
    statement = signing.opened((made / "signature.json").read_bytes(), key_of(made), "it")
    data = datasets.load(made / "data.npz", "test")
    path = tmp_path / "data.npz"
    content = (made / "data.npz").read_bytes()
    for position, other in flips(content):
        path.write_bytes(other)
        assert list(signing.problems(statement, made, Evidence(data, path))), position
    path.write_bytes(content)
    assert list(signing.problems(statement, made, Evidence(data, path))) == []


def test_any_changed_sample_of_a_named_data_set_is_found(made: Path) -> None:
    """Where the data are no file, their content counts."""
    statement = signing.opened((made / "signature.json").read_bytes(), key_of(made), "it")
    data = datasets.load(made / "data.npz", "test")
    for position in range(data.images.size):
        images = data.images.copy()
        images.flat[position] ^= 1
        other = datasets._dataset(  # pyright: ignore[reportPrivateUsage]
            "data", datasets.Source(images, data.labels, data.classes), "test", 0.1
        )
        assert list(signing.problems(statement, made, Evidence(other))), position


def test_any_changed_byte_of_the_signature_is_found(made: Path) -> None:
    content = (made / "signature.json").read_bytes()
    key = key_of(made)
    changed = [*flips(content), (-1, content + b"\n"), (-1, content[:-1]), (-1, b" " + content)]
    for position, other in changed:
        with pytest.raises((DataError, PropertyNotMetError)):
            signing.opened(other, key, f"byte {position}")
    signing.opened(content, key, "it")


def test_any_changed_byte_of_the_public_key_is_found(made: Path, tmp_path: Path) -> None:
    """It is another key then, or none; in the text around it, the same."""
    content, path = (made / "key.pub.pem").read_bytes(), tmp_path / "key.pem"
    signature = (made / "signature.json").read_bytes()
    begin = content.index(b"\n")
    end = content.rindex(b"\n-----")
    for position, other in flips(content):
        path.write_bytes(other)
        if begin < position < end:
            with pytest.raises((DataError, PropertyNotMetError)):
                signing.opened(signature, signing.public_key(path), "it")


@pytest.mark.parametrize("name", ["model.tflite", "certificate.jsonl", "signature.json"])
def test_the_verb_finds_changes(
    made: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((made / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    code, out, err = call(capsys, *verified(tmp_path, "--data", tmp_path / "data.npz"))
    assert code in (1, 2)
    assert name in err
    assert "Traceback" not in out + err
    assert name == "signature.json" or (code == 1 and "NOT" in out)


def test_other_data_and_other_keys_are_found(
    made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = call(capsys, *verified(made, "--data", made / "changed.npz"))
    assert code == 1 and "not the data of certificate.jsonl" in err and "not the file" in err
    code, _, err = call(capsys, *verified(made, "--data", "digits"))
    assert code == 1 and "not the data" in err
    ok("sign", "--new-key", tmp_path / "other.pem")
    arguments = ["verify-signature", made / "signature.json", "--key", tmp_path / "other.pub.pem"]
    code, _, err = call(capsys, *arguments)
    assert code == 1 and "signed with key" in err


def test_nothing_is_signed_that_does_not_belong_together(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "signature.json"
    claim, key, data = made / "certificate.jsonl", made / "key.pem", made / "data.npz"
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_bytes(claim.read_bytes().replace(b'"index":1', b'"index":2'))
    model, other = made / "model.tflite", made / "other.tflite"
    known = ("--key", key, "-o", output)
    cases: list[tuple[str, list[object]]] = [
        ("other models", [other, "--certificate", claim, "--data", data, *known]),
        ("other models", [model, other, "--certificate", claim, "--data", data, *known]),
        ("not the data", [model, "--certificate", claim, "--data", made / "changed.npz", *known]),
        ("needs --data", [model, "--certificate", claim, *known]),
        ("was changed", [model, "--certificate", damaged, "--data", data, *known]),
        ("same name", [*signed(made, "--with", model, "-o", output)[1:]]),
        ("another name", [*signed(made, "-o", tmp_path / "model.tflite")[1:]]),
        ("give it alone", ["--new-key", tmp_path / "new.pem", *known]),
        ("give MODEL", [model, *known]),
        ("no such private key", [*signed(made, "--key", made / "none.pem", "-o", output)[1:]]),
    ]
    for message, arguments in cases:
        code, _, err = call(capsys, "sign", *arguments)
        assert (code, message in err) == (2, True), err
        assert not output.exists()


def test_a_certificate_of_a_query(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("model.tflite", "key.pem", "key.pub.pem"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    query, claim = tmp_path / "query.vnnlib", tmp_path / "certificate.jsonl"
    query.write_text(QUERY)
    model, output = tmp_path / "model.tflite", tmp_path / "signature.json"
    ok("verify", model, query, "-o", claim)
    arguments = ["sign", model, "--certificate", claim, "--key", tmp_path / "key.pem", "-o", output]
    code, _, err = call(capsys, *arguments)
    assert code == 2 and "needs --query" in err
    ok(*arguments, "--query", query)
    ok(*verified(tmp_path))
    query.write_text(QUERY + "\n")
    code, _, err = call(capsys, *verified(tmp_path))
    assert code == 1 and "query.vnnlib" in err


def test_keys(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No key is lost, and no other kind of key or file is taken for one."""
    private = (made / "key.pem").read_bytes()
    code, _, err = call(capsys, "sign", "--new-key", made / "key.pem")
    assert code == 2 and "--force" in err
    assert (made / "key.pem").read_bytes() == private
    secret = ed25519.Ed25519PrivateKey.generate()
    pem, pkcs8 = forms.Encoding.PEM, forms.PrivateFormat.PKCS8
    encrypted = secret.private_bytes(pem, pkcs8, forms.BestAvailableEncryption(b"word"))
    other = rsa.generate_private_key(65537, 1024)
    wrong = {
        "encrypted": encrypted,
        "Ed25519": other.private_bytes(pem, pkcs8, forms.NoEncryption()),
        "not a private key": b"nothing",
    }
    path = tmp_path / "wrong.pem"
    for message, content in wrong.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            signing.private_key(path)
    public = forms.PublicFormat.SubjectPublicKeyInfo
    wrong = {
        "a private key": private,
        "Ed25519": other.public_key().public_bytes(pem, public),
        "not a public key": b"nothing",
    }
    for message, content in wrong.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            signing.public_key(path)


def test_statements_that_are_others(made: Path) -> None:
    """What a key signed for another purpose, or a name that leaves the folder, is refused."""
    secret = signing.private_key(made / "key.pem")
    key = secret.public_key()
    statement = signing.opened((made / "signature.json").read_bytes(), key, "it")
    for name in ("../model.tflite", "/etc/passwd", "", "a/b", ".."):
        subject = signing.Subject(name, signing.Digest("0" * 64))
        with pytest.raises(DataError, match="no file's name"):
            signing.opened(signing.seal(replace(statement, subject=(subject,)), secret), key, "it")
    for other in (replace(statement, type="x"), replace(statement, predicateType="x")):
        with pytest.raises(DataError, match="something else"):
            signing.opened(signing.seal(other, secret), key, "it")


def test_a_statement_that_contradicts_its_certificate(made: Path) -> None:
    """A signer's word about models or data does not replace what the certificate says."""
    statement = signing.opened((made / "signature.json").read_bytes(), key_of(made), "it")
    about = statement.predicate
    assert about.data is not None
    for changed in (
        replace(about, models=("recipe.toml",)),
        replace(about, data=replace(about.data, count=2)),
        replace(about, data=None),
        replace(about, query="recipe.toml"),
    ):
        assert found(replace(statement, predicate=changed), made)


def test_without_the_package(made: Path) -> None:
    program = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from cactus_edge.cli import main\n"
        f"main(['sign', '--new-key', {str(made / 'none.pem')!r}])"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "cactus-edge[sign]" in " ".join(result.stderr.split())
    assert not (made / "none.pem").exists()
