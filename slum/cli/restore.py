"""`slum restore` and `slum resume`: the way back from a backup, and what is asked before anything is done to machines."""

from __future__ import annotations

import getpass
import socket
import time

import click

from slum.cli.backup import settings_of, store_options
from slum.cli.base import Invocation, command, consent
from slum.cli.target import moment
from slum.errors import ConfigError

SEEN_S = 10.0
POLL_S = 0.2
MARKS = {"create": "+", "start": "+", "change": "~", "stop": "-", "destroy": "-", "leave": "!"}
STYLES = {"+": "good", "~": "warn", "-": "bad", "!": "dim"}


@command(
    "restore",
    examples="""
    slum restore --from s3://backups/fleet --data-dir /var/lib/slum
    slum restore --from file:///srv/backup --at 2h --data-dir /tmp/look
    slum restore --from s3://backups/fleet --seq 48211 --recovery-key-file /mnt/usb/slum.key
    """,
)
@click.option("--from", "url", metavar="URL", required=True, help="s3://BUCKET/PREFIX or file:///FOLDER.")
@click.option("--at", "when", metavar="WHEN", help="As it was then: 10m, 2h, 2026-11-22T12:00.  [default: the newest]")
@click.option("--seq", metavar="N", type=click.IntRange(0), help="As it was at this sequence of the ledger.")
@click.option("--claim", metavar="NAME", help="The newest of this claim: when HEAD.json is lost or damaged.")
@click.option("--member", metavar="NAME", help="What the one member is called.  [default: as it was]")
@click.option(
    "--recovery-key-file", metavar="FILE", type=click.Path(), help="Opens the fleet's authority for the new member."
)
@store_options
def restore(
    asked: Invocation,
    url: str,
    when: str | None,
    seq: int | None,
    claim: str | None,
    member: str | None,
    recovery_key_file: str | None,
    endpoint: str | None,
    region: str | None,
    secrets_ref: str | None,
) -> None:
    """Bring the ledger back from a backup into --data-dir, checked whole, as a control plane of one member.

    The data folder must hold no ledger. It starts paused: nothing is told to agents and no machine is made or destroyed until
    `slum resume`, which shows first what would be done. Nothing is started, and the backup is not changed.
    """
    from slum.backup import restore as back

    if sum(one is not None for one in (when, seq, claim)) > 1:
        raise ConfigError("two of --at, --seq and --claim were given", hint="give one")
    now = time.time()
    at = None if when is None else moment(when, now)
    _require_rest(asked)
    back.check_empty(asked.home)
    settings, keys, store = settings_of(asked, url, endpoint, region, secrets_ref)
    done = back.restore(
        asked.home,
        store,
        settings,
        keys,
        seq=seq,
        at=at,
        claim=claim,
        member=member,
        recovery_key=None if recovery_key_file is None else _key(recovery_key_file),
        actor=f"{getpass.getuser()}@{socket.gethostname()}",
        now=now,
        tell=asked.note,
    )
    if asked.json:
        asked.emit({name: getattr(done, name) for name in done.__struct_fields__})
        return
    _say(asked, done)


def _require_rest(asked: Invocation) -> None:
    """ConfigError while a control plane runs in the run folder: it would go on with what it holds open."""
    from slum.node import boot

    running = boot.running(asked.home, {"ledger", "server", "backup"})
    if running:
        raise ConfigError(
            f"{', '.join(running)} of a control plane runs in {asked.home.run}; nothing was changed",
            hint="`slum down` first (services run on), or name another --run-dir",
        )


def _say(asked: Invocation, done: object) -> None:
    from slum.backup.restore import Restored
    from slum.render import quantity

    assert isinstance(done, Restored)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(done.at))
    asked.say(f"restored sequence {done.seq}, revision {done.revision}, of {when}")
    asked.say(f"  chain {done.chain[:16]}, checked; generation {done.was_generation} -> {done.generation}")
    asked.say(f"  cluster {done.cluster}, one member: {done.member}; paused until `slum resume`")
    if done.missing:
        lost = quantity(len(done.missing), "bundle", "bundles")
        asked.say(
            f"  {asked.paint(f'{lost} not in the backup', 'warn')}: services that need one cannot be deployed anew"
        )
    if done.authority == "sealed":
        asked.say(
            f"  {asked.paint('the authority stays closed', 'warn')}: nobody elsewhere can come in. Restore again with --recovery-key-file FILE"
        )
    asked.say("next: slum up                 starts it; agents that find it report, and are told nothing")
    asked.say("      slum resume             shows what would be done to machines and services, asks, goes on")
    if done.authority == "opened":
        asked.say(
            "      slum server init --address HOST      lets machines elsewhere in, by a HOST that they know; then other members"
        )
    if not asked.home.server_config.exists():
        asked.say(
            "      write [backup] into server.toml when this cluster shall go on with the backup (docs/backup.md)"
        )


def _key(file: str) -> str:
    """Return the recovery key in *file*; ConfigError, which does not show it, when there is none."""
    try:
        with open(file, encoding="ascii", errors="replace") as opened:
            lines = [line.strip() for line in opened.read(4096).splitlines()]
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    keys = [line for line in lines if line.startswith("AGE-SECRET-KEY-1")]
    if len(keys) != 1:
        raise ConfigError(
            f"{file} holds no recovery key", hint="it is the line AGE-SECRET-KEY-1... that `slum server init` gave"
        )
    return keys[0]


@command(
    "resume",
    examples="""
    slum resume
    slum resume --yes
    slum resume --json | jq .steps
    """,
)
def resume(asked: Invocation) -> int | None:
    """Show what the restored state would do to the machines and services that exist, ask, and go on.

    Without a restore there is nothing to resume. With --json and without --yes it only shows.
    """
    import msgspec

    from slum.render import clean

    with asked.client() as client:
        end = time.monotonic() + SEEN_S
        found = client.pause()
        while found.paused and found.waiting and time.monotonic() < end:
            time.sleep(POLL_S)
            found = client.pause()
        if not found.paused:
            if asked.json:
                asked.emit({"paused": False, "resumed": False, "steps": [], "waiting": []})
            else:
                asked.say("nothing is paused")
            return None
        if asked.json and not asked.yes:
            asked.emit({**msgspec.to_builtins(found), "resumed": False})
            return None
        if not asked.json:
            asked.say(
                f"paused since {time.strftime('%Y-%m-%d %H:%M', time.localtime(found.since))}: {clean(found.why)}"
            )
            for step in found.steps:
                mark = MARKS.get(step.what, "?")
                what = "/".join(part for part in (step.machine, step.service, step.id) if part)
                line = f"  {mark} {step.what:<8}{what:<32}{clean(step.detail)}".rstrip()
                asked.say(asked.paint(line, STYLES.get(mark, "")))
            for waiting in found.waiting:
                asked.say(f"  ? not seen yet: {clean(waiting)}; there may be more to do")
            if not found.steps:
                asked.say("  nothing would be done: all that is seen is as it was")
        if not consent(asked, "Resume, and do this?"):
            asked.say("still paused")
            return None
        done = client.resume()
    if asked.json:
        asked.emit({**msgspec.to_builtins(found), "resumed": done.changed})
    else:
        asked.say("resumed; `slum status` shows how it goes on")
    return None
