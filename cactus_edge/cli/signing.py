"""The verbs ``sign`` and ``verify-signature``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cactus_edge import files, flatbuffer, signing
from cactus_edge.certificate import Data
from cactus_edge.cli.options import split_of
from cactus_edge.cli.output import ForceOption, JsonOption, emit, table, tell, working
from cactus_edge.errors import DataError, PropertyNotMetError, UsageError, counted

DataFileOption = Annotated[
    str | None,
    typer.Option("--data", help="The data set that the certificate is about.", metavar="NAME"),
]


class SignOutput(msgspec.Struct, frozen=True):
    """What ``sign --json`` prints; ``files`` are SHA-256 by name, empty for a new key."""

    output: str
    key: str
    files: dict[str, str]


def sign(
    models: Annotated[
        list[Path] | None,
        typer.Argument(help="The .tflite files of the certificate.", metavar="MODEL"),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", help="The certificate to sign.")
    ] = None,
    data: DataFileOption = None,
    query: Annotated[
        Path | None, typer.Option("--query", help="The VNN-LIB file that the certificate is about.")
    ] = None,
    other: Annotated[
        list[Path] | None, typer.Option("--with", help="Sign this file, too; repeatable.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", help="The private key: Ed25519, in PEM.")
    ] = None,
    new_key: Annotated[
        Path | None,
        typer.Option("--new-key", help="Make a key instead: this file, and one ending in .pub.pem"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the signature goes.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sign a certificate, its models and the data it is about, all by their SHA-256.

    Example: cactus-edge sign --new-key release.pem

    Example: cactus-edge sign model.tflite --certificate certificate.jsonl --data mnist
    --key release.pem -o model.signature.json
    """
    if new_key is not None:
        if models or certificate or data or query or other or key or output:
            raise UsageError("--new-key makes a key and signs nothing; give it alone")
        public = signing.make_key(new_key, force=force)
        identity = signing.key_id(signing.public_key(public))
        rows = [("private key", new_key), ("public key", public), ("key id", identity)]
        emit(SignOutput(str(new_key), identity, {}), as_json, table("new key", ("", "value"), rows))
        return
    if not models or certificate is None or key is None or output is None:
        raise UsageError("give MODEL, --certificate, --key and -o, or --new-key")
    files.refuse_existing(output, force)
    private = signing.private_key(key)
    with working("sign"):
        evidence = _evidence(data, query, models[0], certificate)
        statement = signing.state(certificate, models, evidence, other or ())
    if output.name in {subject.name for subject in statement.subject}:
        raise UsageError(f"{output.name} is to be signed; give the signature another name")
    files.write(output, signing.seal(statement, private), force=force)
    hashes = {subject.name: subject.digest.sha256 for subject in statement.subject}
    shown = SignOutput(str(output), signing.key_id(private.public_key()), hashes)
    emit(shown, as_json, table(f"signed in {output}", ("file", "sha256"), list(hashes.items())))


class VerifySignatureOutput(msgspec.Struct, frozen=True):
    """What ``verify-signature --json`` prints; ``data_compared``: the data was given."""

    intact: bool
    key: str
    files: dict[str, str]
    data: Data | None
    data_compared: bool
    problems: tuple[str, ...]


def verify_signature(
    signature: Annotated[Path, typer.Argument(help="What sign wrote.", metavar="SIGNATURE")],
    key: Annotated[Path, typer.Option("--key", help="The signer's public key: Ed25519, in PEM.")],
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Where the signed files are; the signature's without it."),
    ] = None,
    data: DataFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a signature, that each signed file is unchanged, and that they belong together.

    Who signed is known then; what the certificate claims is for check to confirm. Example:
    cactus-edge verify-signature model.signature.json --key release.pub.pem --data mnist
    """
    public = signing.public_key(key)
    statement = signing.opened(files.read(signature, "signature"), public, str(signature))
    where = signature.parent if folder is None else folder
    with working("verify"):
        found = tuple(signing.problems(statement, where, signing.Evidence()))
    about = statement.predicate
    if data is not None:
        if about.data is None:
            raise UsageError(f"{signature} signs a certificate about a query, not about --data")
        if not found:
            model, claim = where / about.models[0], where / about.certificate
            with working("compare the data"):
                evidence = _evidence(data, None, model, claim)
                found = tuple(signing.problems(statement, where, evidence))
    hashes = {subject.name: subject.digest.sha256 for subject in statement.subject}
    shown = VerifySignatureOutput(
        not found, signing.key_id(public), hashes, about.data, data is not None, found
    )
    rows: list[tuple[str, object]] = list(hashes.items())
    if about.data is not None:
        name = f"data {about.data.name} {about.data.split}"
        rows.append((name, about.data.sha256 if data else "not compared; give it with --data"))
    title = f"{signature}: {'intact' if not found else 'NOT intact'}, key {shown.key[:16]}"
    emit(shown, as_json, table(title, ("", "sha256"), rows))
    if found:
        for problem in found:
            tell(f"- {problem}")
        raise PropertyNotMetError(f"{signature}: {counted(len(found), 'problem')}, see above")


def _evidence(
    data: str | None, query: Path | None, model: Path, certificate: Path
) -> signing.Evidence:
    """Data or query at hand; the split is the one that the certificate names."""
    if data is None:
        return signing.Evidence(query=query)
    about = signing.head(certificate).data
    if about is None:
        raise DataError(f"{certificate} is about a query; give that with --query")
    dataset = split_of(data, about.split, flatbuffer.load(model)[0])
    return signing.Evidence(dataset, Path(data) if data.endswith(".npz") else None, query)


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(sign)
    app.command("verify-signature")(verify_signature)
