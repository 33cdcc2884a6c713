"""`slum backup status` and `verify`: how far the backup is, and whether it can be restored. Changes nothing."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import click

from slum.cli.base import Invocation, SlumGroup, command
from slum.errors import ConfigError, SlumError, Unhealthy

if TYPE_CHECKING:
    from slum.backup.config import Keys, Settings
    from slum.backup.manifest import Head
    from slum.backup.status import Status
    from slum.backup.store import Store

STALE_S = 30.0


def store_options(function: Any) -> Any:
    """Add how a store is reached that is not the one of this machine's server.toml."""
    for option in reversed(
        (
            click.option("--endpoint", metavar="URL", help="Of an S3 server that is not Amazon's."),
            click.option("--region", metavar="NAME", help="Of the S3 server.  [default: us-east-1]"),
            click.option(
                "--secrets-ref",
                metavar="file:/ABS",
                help="A file with AWS_ACCESS_KEY_ID=... and AWS_SECRET_ACCESS_KEY=...  [default: the environment]",
            ),
        )
    ):
        function = option(function)
    return function


def settings_of(
    asked: Invocation, url: str | None, endpoint: str | None, region: str | None, secrets_ref: str | None
) -> tuple[Settings, Keys, Store]:
    """Return the store that *url* and its options name, else the one of server.toml; ConfigError when there is none."""
    from slum.backup import config
    from slum.backup.store import open_store

    if url is not None:
        settings = config.made(url, endpoint=endpoint, region=region, secrets_ref=secrets_ref)
        keys = config.keys_of(settings, os.environ, None)
        return settings, keys, open_store(settings, keys)
    found = config.load(asked.home)
    if found is None:
        raise ConfigError(
            f"no backup is configured: there is no [backup] in {asked.home.server_config}",
            hint='write [backup] and url = "s3://BUCKET/PREFIX" or "file:///FOLDER" into it, then `slum up`',
        )
    keys = config.keys_of(found, os.environ, config.secrets_file(asked.home))
    return found, keys, open_store(found, keys)


@command(
    "status",
    examples="""
    slum backup status
    slum backup status --json
    """,
)
def status(asked: Invocation) -> int | None:
    """Show where the backup goes, how far behind it is, and when a restore was tried last.

    Ends with 8 when it is behind, refused or its last trial failed.
    """
    from slum.backup import status as said

    settings, _keys, store = settings_of(asked, None, None, None, None)
    head = _head(store)
    # Afterwards: a store that hangs is asked for long.
    found, now = said.read(asked.home), time.time()
    waiting, waiting_s = _waiting(asked, found, head, now)
    well = _is_well(found, head, now, waiting is not None) and (waiting == 0 or waiting_s <= settings.alarm)
    if asked.json:
        trouble = head.message if isinstance(head, SlumError) else ""
        shown = None if isinstance(head, SlumError) else head
        asked.emit(
            {
                "url": settings.url,
                "ok": well,
                "trouble": trouble,
                "waiting": waiting,
                "waiting_s": round(waiting_s, 3),
                "process": found,
                "head": shown,
            }
        )
        return None if well else Unhealthy.exit_code
    for line in _lines(asked, settings, found, head, waiting, waiting_s, now):
        asked.say(line)
    return None if well else Unhealthy.exit_code


def _waiting(
    asked: Invocation, found: Status | None, head: Head | SlumError | None, now: float
) -> tuple[int | None, float]:
    """Return how many entries of this machine's ledger are not in the store, for how long; None when nobody knows.

    Asked of the ledger itself, so that it is seen too when the process that should send them does not run.
    """
    from slum.ledger import folder, follow

    known = head if head is not None and not isinstance(head, SlumError) else found.head if found is not None else None
    if known is None or folder.current(asked.home.state) is None:
        return None, 0.0
    entries, since = follow.after(asked.home.state, known.generation, known.seq)
    return entries, 0.0 if since is None else max(0.0, now - since)


def _head(store: Store) -> Head | SlumError | None:
    from slum.backup import manifest

    try:
        found = store.get(manifest.HEAD)
        return None if found is None else manifest.decode_head(found.data)
    except SlumError as error:
        return error


def _is_well(found: Status | None, head: Head | SlumError | None, now: float, has_ledger: bool) -> bool:
    if isinstance(head, SlumError) or head is None:
        return False
    if head.verified is not None and not head.verified.ok:
        return False
    if found is None:
        return not has_ledger
    return found.state in ("running", "waiting") and now - found.at < STALE_S


def _lines(
    asked: Invocation,
    settings: Settings,
    found: Status | None,
    head: Head | SlumError | None,
    waiting: int | None,
    waiting_s: float,
    now: float,
) -> list[str]:
    from slum.render import clean, quantity, seconds, size

    lines = [f"backup     {settings.url}"]
    lines.append(f"process    {_process(asked, found, now)}")
    waits = f", {size(found.backlog_bytes)} beside the mirror" if found is not None and found.backlog_bytes else ""
    if waiting == 0:
        lag = asked.paint("nothing is waiting", "good")
    elif waiting is not None:
        worse = "bad" if waiting_s > settings.alarm else "warn"
        lag = asked.paint(f"{quantity(waiting, 'entry', 'entries')}, {seconds(waiting_s)}", worse) + waits
    else:
        lag = ""
    if isinstance(head, SlumError):
        lines.append(f"store      {asked.paint('does not answer', 'bad')}: {clean(head.message)}")
        return [*lines, *([f"lag        {lag}"] if lag else []), f"  next: {head.hint}"]
    if head is None:
        return [*lines, f"store      {asked.paint('empty', 'warn')}: nothing has been sent yet"]
    lines.append(
        f"store      sequence {head.seq}, revision {head.revision}, {seconds(now - head.at)} ago by {head.member or 'nobody'}"
    )
    if lag:
        lines.append(f"lag        {lag}")
    reach = f"from sequence {head.spans[0].first_seq}, {seconds(now - head.spans[0].first_at)} ago"
    lines.append(f"reach      {reach}; {quantity(len(head.spans), 'claim')}, generation {head.generation}")
    lines.append(f"size       {size(head.bytes)}")
    if head.verified is None:
        lines.append(f"verified   {asked.paint('never', 'warn')}")
    else:
        word = asked.paint("restored", "good") if head.verified.ok else asked.paint("failed", "bad")
        why = f": {clean(head.verified.why)}" if head.verified.why else ""
        lines.append(f"verified   {word} {seconds(now - head.verified.at)} ago, sequence {head.verified.seq}{why}")
    if found is not None and found.hint:
        lines.append(f"  next: {clean(found.hint)}")
    return lines


def _process(asked: Invocation, found: Status | None, now: float) -> str:
    from slum.render import clean, seconds

    if found is None:
        return f"{asked.paint('never ran here', 'warn')}: `slum up` starts it"
    if now - found.at > STALE_S:
        return f"{asked.paint('silent', 'bad')} for {seconds(now - found.at)}: `slum up` starts it"
    style = {"running": "good", "refused": "bad", "behind": "bad"}.get(found.state, "warn")
    return asked.paint(found.state, style) + (f": {clean(found.why)}" if found.why else f", pid {found.pid}")


@command(
    "verify",
    examples="""
    slum backup verify
    slum backup verify --from s3://backups/fleet --endpoint https://s3.example.com
    """,
)
@click.option("--from", "url", metavar="URL", help="Another backup than the one of server.toml.")
@store_options
def verify(
    asked: Invocation, url: str | None, endpoint: str | None, region: str | None, secrets_ref: str | None
) -> int | None:
    """Restore the newest point to a temporary folder and check all of it: integrity, chain, events, rows.

    Ends with 8 when it cannot be restored; says what can.
    """
    from slum.backup import verify as trial
    from slum.render import clean

    settings, keys, store = settings_of(asked, url, endpoint, region, secrets_ref)
    found = trial.verified(store, settings, keys)
    if asked.json:
        asked.emit({"url": settings.url, **{name: getattr(found, name) for name in found.__struct_fields__}})
    elif found.ok:
        asked.say(
            f"sequence {found.seq} was restored and checked in {found.took_s:.1f} s: {asked.paint('it holds', 'good')}"
        )
        if found.why:
            asked.say(f"  {asked.paint(clean(found.why), 'warn')}")
    else:
        asked.say(f"{asked.paint('it does not hold', 'bad')}: {clean(found.why)}")
        if found.hint:
            asked.say(f"  next: {clean(found.hint)}")
    return None if found.ok else Unhealthy.exit_code


@click.group("backup", cls=SlumGroup, epilog="  slum backup status\n  slum backup verify", no_args_is_help=True)
def backup() -> None:
    """Where the ledger is backed up to, how far behind, and whether it can be restored (docs/backup.md)."""


backup.add_command(status)
backup.add_command(verify)
