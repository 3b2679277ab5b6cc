"""`shoal audit`: whether an audit log is genuine, its records for other tools, one record with its proof."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console

from shoal.cli.errors import CommandError
from shoal.cli.terminal import error_console, print_json, printable
from shoal.serve.audit.chain import chains, public_keys
from shoal.serve.audit.export import ExportFormat, export_lines
from shoal.serve.audit.note import AuditError, PublicKey
from shoal.serve.audit.proof import check, prove
from shoal.serve.audit.verify import ChainReport, Expectation, Report, verify_directory


def verify_log(
    directory: Path,
    *,
    key_files: Sequence[Path],
    copy: Path | None,
    expected: Sequence[str],
    retained_from: int,
    as_json: bool,
) -> int:
    """Exit status: 0 where the log is genuine, 1 where it is not. Raises CommandError."""
    try:
        report = verify_directory(
            directory,
            keys=[_public_key(path) for path in key_files],
            copy=copy,
            expected=[_expectation(text) for text in expected],
            retained_from=retained_from,
        )
    except AuditError as error:
        raise CommandError(str(error)) from None
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        _print(report, directory, own_key=not key_files and copy is None)
    return 0 if report.ok else 1


def export_log(directory: Path, *, since: str | None, until: str | None, form: ExportFormat) -> None:
    """To standard output. Raises CommandError."""
    first, last = _moment("--since", since), _moment("--until", until)
    out = sys.stdout.buffer
    try:
        for line in export_lines(directory, since=first, until=last, form=form):
            out.write(line + b"\n")
    except AuditError as error:
        out.flush()
        raise CommandError(str(error)) from None
    out.flush()


def prove_record(directory: Path, number: int, *, chain: str | None) -> None:
    """The proof, to standard output. Raises CommandError."""
    found = [path for path in chains(directory) if chain in (None, path.name)]
    if not found:
        raise CommandError(f"{directory}: there is no audit log here: no directory named {chain or 'chain-*'}")
    if len(found) > 1:
        raise CommandError(f"--chain must say of which chain: {', '.join(path.name for path in found)}")
    try:
        print(prove(found[0], number, public_keys(directory)), end="")
    except (AuditError, ValueError) as error:
        raise CommandError(str(error)) from None


def check_proof(file: Path, *, keys: Sequence[Path], as_json: bool) -> None:
    """The record that is proven. Raises CommandError."""
    try:
        proven = check(file.read_text(encoding="utf-8"), [_public_key(path) for path in keys])
    except UnicodeDecodeError:
        raise CommandError(f"{file}: this is not a proof as `shoal audit prove` makes it") from None
    except AuditError as error:
        raise CommandError(f"{file}: {error}") from None
    if as_json:
        print_json({"chain": proven.chain, "record": msgspec.json.decode(proven.record)})
        return
    signer = proven.checkpoint.origin.rpartition("/")[0]
    when = datetime.fromtimestamp(proven.checkpoint.time / 1e9, UTC).isoformat(timespec="seconds")
    print(printable(proven.record.decode(errors="replace")))
    told = f"proven: record {proven.seq} of {proven.chain}, signed by {signer} at {when}"
    error_console().print(told, soft_wrap=True, markup=False)


def _public_key(path: Path) -> PublicKey:
    try:
        return PublicKey.parse(path.read_text(encoding="utf-8"))
    except ValueError:
        raise CommandError(f"--public-key: {path} is not a public key of an audit log (a *.pub file)") from None


def _expectation(text: str) -> tuple[str | None, Expectation]:
    """[CHAIN:]SIZE:ROOT"""
    chain, separator, rest = text.partition(":")
    named = separator and not chain.isdigit()
    try:
        return (chain, Expectation.parse(rest)) if named else (None, Expectation.parse(text))
    except ValueError as error:
        raise CommandError(f"--expect: {error}") from None


def _moment(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise CommandError(f"{flag}: {text!r} is not a time: write 2026-11-21 or 2026-11-21T14:00:00Z") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    seconds = int(moment.replace(microsecond=0).timestamp())
    return seconds * 1_000_000_000 + moment.microsecond * 1000


def _print(report: Report, directory: Path, *, own_key: bool) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for chain in report.chains:
        verdict = "[bold green]genuine[/]" if chain.ok else "[bold red]NOT GENUINE[/]"
        console.print(f"{chain.chain}: {verdict}, {_facts(chain)}", style=None)
        if chain.problem is not None:
            where = f" ({chain.file})" if chain.file else ""
            console.print(f"  {chain.problem}{where}", style="red", markup=False)
        elif chain.expect:
            console.print(f"  note elsewhere: --expect {chain.chain}:{chain.expect}", style="dim", markup=False)
    for problem in report.problems:
        console.print(problem, style="red", markup=False)
    if own_key:
        console.print(
            f"Signatures were checked against the public keys in {directory} itself: keep a copy of the *.pub file "
            "elsewhere and give it with --public-key.",
            style="dim",
            markup=False,
        )


def _facts(chain: ChainReport) -> str:
    """What was found, in one line."""
    facts = [_count(chain.records - chain.first, "record") + (f" from {chain.first:,} on" if chain.first else "")]
    copied = f" ({chain.copied} in the copy)" if chain.copied else ""
    facts.append(_count(chain.checkpoints, "checkpoint") + copied)
    if chain.ok:
        facts.append(f"{chain.unsigned} not signed yet" if chain.unsigned else "all signed")
    if chain.gaps:
        facts.append(f"{_count(chain.gaps, 'gap')} with {_count(chain.lost, 'event')} lost")
    if chain.crashes:
        facts.append(f"{chain.crashes} of {chain.runs} processes did not end in order")
    if chain.live:
        facts.append("being written")
    return ", ".join(facts)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
