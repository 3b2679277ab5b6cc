"""`shoal keys`: the file of API keys that a gateway reads, and reads again when it changes."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from shoal.serve.tenants import Scope, StoredKey

keys_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Make, list, rotate and revoke the API keys of a gateway."
)

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a time: write 90d, 12h, 30m, 45s or 0s")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _moment(text: str) -> datetime:
    """From now, or a date."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        try:
            return datetime.now(UTC).replace(microsecond=0) + _duration(text)
        except (typer.BadParameter, OverflowError):
            message = f"{text!r} is no moment: write 90d, 12h (from now), 2027-01-31 or 2027-01-31T12:00:00Z"
            raise typer.BadParameter(message) from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _scope(text: str) -> str:
    from difflib import get_close_matches

    from shoal.serve.tenants import SCOPES

    if text not in SCOPES:
        near = get_close_matches(text, SCOPES, n=1, cutoff=0.0)[0]
        raise typer.BadParameter(f"{text!r} is not a scope; the nearest is {near}, and there are {', '.join(SCOPES)}")
    return text


File = Annotated[Path, typer.Option("--file", "-f", metavar="FILE", help="The file of keys.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="What `shoal keys list` shows.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_FILE = Path("shoal-keys.json")


@keys_app.command()
def create(
    tenant: Annotated[str, typer.Option("--tenant", "-t", metavar="NAME", help="Whose key it is.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            "-s",
            parser=_scope,
            metavar="SCOPE",
            help="generate, read, metrics, admin or engine; repeat for more. [default: generate and read]",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="For people, as 'laptop of Ada'.")] = "",
    expires: Annotated[
        datetime | None, typer.Option(parser=_moment, metavar="TIME", help="As 90d or 2027-01-31. [default: never]")
    ] = None,
    not_before: Annotated[
        datetime | None, typer.Option(parser=_moment, metavar="TIME", help="Valid from then on. [default: now]")
    ] = None,
    file: File = DEFAULT_FILE,
    as_json: Json = False,
) -> None:
    """Make a key and print it. It is shown this once: the file holds a hash of it.

    **Examples**

    - `shoal keys create --tenant acme`
    - `shoal keys create --tenant acme --name laptop --expires 90d`
    - `shoal keys create --tenant ops --scope metrics --scope admin --json`
    """
    from shoal.serve.tenants import DEFAULT_SCOPES, editing, new_key

    scopes = cast("list[Scope]", scope) or DEFAULT_SCOPES
    made, key = new_key(tenant, scopes, _now(), name=name, not_before=not_before, expires=expires)
    with editing(file, create=True) as keys:
        keys.append(made)
    _print_new(made, key, f"key {made.id} of tenant {tenant} is in {file}", as_json=as_json)


@keys_app.command("list")
def list_keys(file: File = DEFAULT_FILE, as_json: Json = False) -> None:
    """Show the keys of a file, without their secrets.

    **Examples**

    - `shoal keys list`
    - `shoal keys list --file /etc/shoal/keys.json --json`
    """
    from rich.console import Console
    from rich.table import Table

    from shoal.cli.terminal import print_json
    from shoal.serve.tenants import read_keys

    found, now = read_keys(file).keys, _now()
    if as_json:
        print_json([_facts(key, now) for key in found])
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "tenant", "scopes", "state", "created", "expires", "name"):
        table.add_column(column, overflow="fold")
    for key in found:
        created, expires = _day(key.created), _day(key.expires) if key.expires else "never"
        table.add_row(key.id, key.tenant, " ".join(key.scopes), _state(key, now), created, expires, key.name)
    Console(highlight=False, markup=False).print(table)


@keys_app.command()
def rotate(
    key_id: KeyId,
    grace: Annotated[
        timedelta, typer.Option(parser=_duration, metavar="TIME", help="How long the old key stays valid.")
    ] = "24h",  # type: ignore[assignment]
    file: File = DEFAULT_FILE,
    as_json: Json = False,
) -> None:
    """Give a key a new secret and print it. The old one stays valid for a while, so that clients can change over.

    **Examples**

    - `shoal keys rotate 3f9a1c0b7d2e`
    - `shoal keys rotate 3f9a1c0b7d2e --grace 0s`
    """
    from shoal.serve.tenants import editing, rotated

    with editing(file) as keys:
        at = _find(keys, key_id, file)
        keys[at], key = rotated(keys[at], _now(), grace)
        made = keys[at]
    old = f"until {_now() + grace:%Y-%m-%d %H:%M} UTC" if grace else "no longer"
    _print_new(made, key, f"key {key_id} has a new secret; the old one is valid {old}", as_json=as_json)


@keys_app.command()
def revoke(key_id: KeyId, file: File = DEFAULT_FILE, as_json: Json = False) -> None:
    """Make a key invalid, within a second and for good. It stays in the list.

    **Examples**

    - `shoal keys revoke 3f9a1c0b7d2e`
    """
    import msgspec

    from shoal.cli.terminal import print_json
    from shoal.serve.tenants import editing

    now = _now()
    with editing(file) as keys:
        at = _find(keys, key_id, file)
        if keys[at].revoked is None:
            keys[at] = msgspec.structs.replace(keys[at], revoked=now)
        revoked = keys[at]
    if as_json:
        print_json(_facts(revoked, now))
    else:
        print(f"key {key_id} of tenant {revoked.tenant} is revoked")


def _find(keys: list[StoredKey], key_id: str, file: Path) -> int:
    from difflib import get_close_matches

    from shoal.cli.errors import CommandError

    ids = [key.id for key in keys]
    if key_id in ids:
        return ids.index(key_id)
    near = get_close_matches(key_id, ids, n=1, cutoff=0.0)
    hint = f"the nearest is {near[0]}" if near else "it holds none"
    raise CommandError(f"{file} holds no key {key_id}; {hint} (see `shoal keys list --file {file}`)")


def _print_new(key: StoredKey, text: str, note: str, *, as_json: bool) -> None:
    """The key alone on standard output, so that it can be piped into where it is kept."""
    from shoal.cli.terminal import print_json

    if as_json:
        print_json({"key": text, **_facts(key, _now())})
        return
    print(text)
    print(f"{note}; what is printed here is shown only this once", file=sys.stderr)


def _facts(key: StoredKey, now: datetime) -> dict[str, Any]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "scopes": key.scopes,
        "state": _state(key, now),
        "name": key.name,
        "created": key.created,
        "not_before": key.not_before,
        "expires": key.expires,
        "revoked": key.revoked,
        "old_secret_until": max((s.expires for s in key.secrets if s.expires and s.expires > now), default=None),
    }


def _state(key: StoredKey, now: datetime) -> str:
    return (key.problem(now) or "valid").replace("_", " ")


def _day(when: datetime) -> str:
    return f"{when:%Y-%m-%d}"


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
