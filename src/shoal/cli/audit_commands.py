"""The flags and the help of `shoal audit`. What its commands do is in `cli.audit`, imported when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

audit_app = typer.Typer(no_args_is_help=True, help="Verify an audit log, and hand it to other tools.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AuditDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="The log's directory.", show_default=False)]
PublicKeys = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Who must have signed. [default: *.pub in the copy, or in DIR]"),
]


@audit_app.command("verify")
def audit_verify(
    directory: AuditDirectory,
    public_key: PublicKeys = None,
    copy: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where checkpoints were copied to (copy_to)."),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="[CHAIN:]SIZE:ROOT", help="What an earlier verification printed."),
    ] = None,
    retained_from: Annotated[
        int, typer.Option(min=0, metavar="N", help="Records before N were removed on purpose.")
    ] = 0,
    as_json: Json = False,
) -> int:
    """Say whether an audit log is genuine; name the first record that was changed, removed, moved or put in.

    The exit status is 0 if it is, 1 if it is not. A log that is being written can be verified, too. That log and
    checkpoints were both put back to an older state is found with `--copy` or `--expect`.

    **Examples**

    - `shoal audit verify /var/log/shoal`
    - `shoal audit verify /var/log/shoal --public-key 1f3a9c2e.pub --copy /mnt/elsewhere/checkpoints`
    - `shoal audit verify /var/log/shoal --json`
    """
    from shoal.cli.audit import verify_log

    return verify_log(
        directory,
        key_files=public_key or [],
        copy=copy,
        expected=expect or [],
        retained_from=retained_from,
        as_json=as_json,
    )


@audit_app.command("export")
def audit_export(
    directory: AuditDirectory,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="ISO 8601, as 2026-11-21T14:00:00Z.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Up to there, not included.")] = None,
    form: Annotated[
        Literal["jsonl", "ocsf"],
        typer.Option("--format", help="jsonl: the records as they are; ocsf: OCSF 1.3.0 events."),
    ] = "jsonl",
) -> None:
    """Print an audit log's records as JSON lines, those of all gateways in the order of their times.

    **Examples**

    - `shoal audit export /var/log/shoal --since 2026-11-01`
    - `shoal audit export /var/log/shoal --format ocsf > events.jsonl`
    """
    from shoal.cli.audit import export_log

    export_log(directory, since=since, until=until, form=form)


@audit_app.command("prove")
def audit_prove(
    directory: AuditDirectory,
    number: Annotated[int, typer.Argument(min=0, metavar="RECORD", help="Its `seq`.", show_default=False)],
    chain: Annotated[str | None, typer.Option(help="Of which chain. [default: the only one]")] = None,
) -> None:
    """Print one record with the proof that it is in the log, for someone who is to see no other.

    **Examples**

    - `shoal audit prove /var/log/shoal 1234 > record-1234.proof`
    """
    from shoal.cli.audit import prove_record

    prove_record(directory, number, chain=chain)


@audit_app.command("check")
def audit_check(
    file: Annotated[Path, typer.Argument(metavar="PROOF", help="What `prove` printed.", show_default=False)],
    public_key: Annotated[list[Path], typer.Option(metavar="FILE", help="Who must have signed.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Check a record's proof, without the log, and print the record.

    **Examples**

    - `shoal audit check record-1234.proof --public-key 1f3a9c2e.pub`
    """
    from shoal.cli.audit import check_proof

    check_proof(file, keys=public_key, as_json=as_json)
