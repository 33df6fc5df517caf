"""Signatures: who vouches for a model and its certificate, and over which bytes.

A signature is a file of its own, one line: a DSSE envelope (github.com/secure-systems-lab/dsse,
protocol 1.0.2) with one Ed25519 signature (RFC 8032) over an in-toto Statement (version 1). The
statement names every file by its SHA-256, and says which of them are the certificate and its
models, and which data or query the certificate is about. It holds no time: a clock proves nothing.

Signing and verifying both read the certificate and compare what it names with what is there. What
a certificate claims is re-derived by ``check`` alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cactus_edge import __version__, files
from cactus_edge import certificate as certificates
from cactus_edge.certificate_stream import reading
from cactus_edge.datasets import Dataset
from cactus_edge.errors import DataError, MissingExtraError, PropertyNotMetError, UsageError

__all__ = [
    "Evidence",
    "make_key",
    "opened",
    "private_key",
    "problems",
    "public_key",
    "seal",
    "state",
]

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://cactus-edge.invalid/signed-certificate/v1"
"""Names the fields of ``Predicate``; another meaning gets another number."""
_LIMIT = 1 << 24
_PRIVATE_MODE = 0o600


class Digest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a file's bytes, hexadecimal."""

    sha256: str


class Subject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A signed file; ``name`` has no folder."""

    name: str
    digest: Digest


class Predicate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the subjects are to each other.

    ``certificate`` and ``models`` are names of subjects, the models in the certificate's order.
    ``data`` is what the certificate says of its samples; ``data_file`` the SHA-256 of the .npz file
    that they came from, empty for a named data set. ``query`` names a subject, or is empty.
    """

    tool: str
    certificate: str
    models: tuple[str, ...]
    data: certificates.Data | None
    data_file: str
    query: str


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An in-toto Statement, version 1."""

    type: str = msgspec.field(name="_type")
    subject: tuple[Subject, ...]
    predicateType: str  # noqa: N815  # the standard's word
    predicate: Predicate


class Signed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``keyid``: SHA-256 of the public key's DER encoding (SubjectPublicKeyInfo)."""

    keyid: str
    sig: bytes


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A DSSE envelope; bytes are base64 in its JSON."""

    payload: bytes
    payloadType: str  # noqa: N815  # the standard's word
    signatures: tuple[Signed]


@dataclass(frozen=True)
class Evidence:
    """The data that the caller has at hand: ``file`` is that of ``data``, where it has one."""

    data: Dataset | None = None
    file: Path | None = None
    query: Path | None = None


def make_key(path: Path, *, force: bool = False) -> Path:
    """Write a new private key (PEM, PKCS #8, readable by its owner alone); its public key's path.

    Raises:
        OutputError: one of the two files exists and ``force`` is not given.
        MissingExtraError: ``cryptography`` is not installed.
    """
    _require()
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public_path = path.with_suffix(f".pub{path.suffix}")
    for output in (path, public_path):
        files.refuse_existing(output, force)
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    public = key.public_key().public_bytes(
        forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo
    )
    files.write(path, private, force=force, mode=_PRIVATE_MODE)
    files.write(public_path, public, force=force)
    return public_path


def private_key(path: Path) -> Ed25519PrivateKey:
    """A private key's file.

    Raises:
        UsageError: it cannot be read.
        DataError: it is no unencrypted Ed25519 key in PEM.
    """
    _require()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = files.read(path, "private key")
    try:
        key = load_pem_private_key(content, None)
    except TypeError:
        raise DataError(f"{path}: the key is encrypted; give one without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise DataError(f"{path}: not a private key in PEM; make one with --new-key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise DataError(f"{path}: not an Ed25519 key; make one with --new-key")
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """A public key's file.

    Raises:
        UsageError: it cannot be read.
        DataError: it is no Ed25519 key in PEM.
    """
    _require()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = files.read(path, "public key")
    if b"PRIVATE KEY" in content:
        raise DataError(f"{path}: a private key; verify with the public one, its .pub.pem")
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise DataError(f"{path}: not a public key in PEM") from None
    if not isinstance(key, Ed25519PublicKey):
        raise DataError(f"{path}: not an Ed25519 key")
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the key's DER encoding (SubjectPublicKeyInfo), hexadecimal."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    encoded = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).hexdigest()


def state(
    certificate: Path, models: Sequence[Path], evidence: Evidence, others: Sequence[Path] = ()
) -> Statement:
    """What is to be signed, of files that belong together.

    Args:
        certificate: whole, and about ``models`` in this order.
        models: their .tflite files.
        evidence: the data or the query that the certificate is about.
        others: more files to sign, such as a recipe.

    Raises:
        UsageError: a file cannot be read, or two have the same name.
        DataError: the certificate is damaged, or is about other models or other data.
    """
    paths = [certificate, *models, *others]
    if evidence.query is not None:
        paths.append(evidence.query)
    subjects = {path.name: Subject(path.name, Digest(_sha256(path))) for path in paths}
    if len(subjects) < len(paths):
        raise UsageError("two of the files have the same name; give each another one")
    claim = head(certificate)
    predicate = Predicate(
        tool=f"cactus_edge {__version__}",
        certificate=certificate.name,
        models=tuple(model.name for model in models),
        data=claim.data,
        data_file="" if evidence.file is None else _sha256(evidence.file),
        query="" if evidence.query is None else evidence.query.name,
    )
    statement = Statement(STATEMENT_TYPE, tuple(subjects.values()), PREDICATE_TYPE, predicate)
    given = evidence.data is not None, evidence.query is not None
    if given != (claim.data is not None, claim.query is not None):
        wanted = "--query FILE" if claim.query else "--data NAME"
        raise UsageError(f"{certificate} needs {wanted}, and nothing else, to be signed")
    for problem in _certificate_problems(statement, certificate, evidence):
        raise DataError(problem)
    return statement


def seal(statement: Statement, key: Ed25519PrivateKey) -> bytes:
    """The signature's file; the same statement and key make the same bytes."""
    payload = msgspec.json.encode(statement)
    signed = Signed(key_id(key.public_key()), key.sign(_encoded(PAYLOAD_TYPE, payload)))
    return msgspec.json.encode(Envelope(payload, PAYLOAD_TYPE, (signed,))) + b"\n"


def opened(content: bytes, key: Ed25519PublicKey, name: str) -> Statement:
    """The statement in a signature's file ``name``, once its signature is found to be the key's.

    Raises:
        DataError: it is no signature, or not in canonical form.
        PropertyNotMetError: it is not this key's, or not over this statement.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        envelope = msgspec.json.decode(content, type=Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{name}: not a signature: {error}") from None
    # Base64 and JSON have many spellings of the same content; one of them is accepted.
    if msgspec.json.encode(envelope) + b"\n" != content:
        raise DataError(f"{name}: the signature is not in canonical form; it was changed")
    (signed,) = envelope.signatures
    if signed.keyid != key_id(key):
        raise PropertyNotMetError(f"{name}: signed with key {signed.keyid}, not {key_id(key)}")
    try:
        key.verify(signed.sig, _encoded(envelope.payloadType, envelope.payload))
    except InvalidSignature:
        raise PropertyNotMetError(f"{name}: the signature does not fit; it was changed") from None
    try:
        statement = msgspec.json.decode(envelope.payload, type=Statement)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{name}: signs something else: {error}") from None
    kinds = (envelope.payloadType, statement.type, statement.predicateType)
    if kinds != (PAYLOAD_TYPE, STATEMENT_TYPE, PREDICATE_TYPE):
        raise DataError(f"{name}: signs something else: {', '.join(kinds)}")
    for subject in statement.subject:
        plain = Path(subject.name).name == subject.name and "\0" not in subject.name
        if not plain or subject.name in ("", ".", ".."):
            raise DataError(f"{name}: {subject.name!r} is no file's name")
    return statement


def problems(statement: Statement, folder: Path, evidence: Evidence) -> Iterator[str]:
    """What is not as it was signed; data and their file are compared where they are given.

    Raises:
        UsageError: a signed file is not in ``folder``, or cannot be read.
    """
    changed = False
    for subject in statement.subject:
        path = folder / subject.name
        if _sha256(path) != subject.digest.sha256:
            changed = True
            yield f"{path}: not the file that was signed"
    signed = statement.predicate.data_file
    if evidence.file is not None and signed and _sha256(evidence.file) != signed:
        yield f"{evidence.file}: not the file that was signed"
    if not changed:  # what was signed can be read
        yield from _certificate_problems(
            statement, folder / statement.predicate.certificate, evidence
        )


def _certificate_problems(statement: Statement, path: Path, evidence: Evidence) -> Iterator[str]:
    """Where a whole certificate is not about the models, the data or the query of a statement."""
    claim, about = head(path), statement.predicate
    hashes = {subject.name: subject.digest.sha256 for subject in statement.subject}
    named = [model.sha256 for model in claim.models]
    if named != [hashes.get(name) for name in about.models]:
        yield f"{path}: the certificate is about other models than {', '.join(about.models)}"
    if about.data != claim.data:
        yield f"{path}: the certificate is about other data than the signature says"
    query = None if claim.query is None else claim.query.sha256
    if hashes.get(about.query) != query:
        yield f"{path}: the certificate is about another query than {about.query or 'none'}"
    given = evidence.data
    if given is not None and claim.data is not None and given.sha256 != claim.data.sha256:
        yield f"data set '{given.name}' {given.split}: not the data of {path.name}"


def head(path: Path) -> certificates.Head:
    """Of a certificate that is whole and unchanged since it was written."""
    with reading(path) as reader:
        for _ in reader.lines():
            pass
        for problem in reader.problems():
            raise DataError(f"{path}: {problem}")
        return reader.head


def _encoded(kind: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what the signature is over."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot read it ({error.strerror})") from None


def _require() -> None:
    try:
        import cryptography  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise MissingExtraError("cryptography", "sign", "signing") from None
