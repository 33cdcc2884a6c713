"""`slum token`: single-use tokens that let a node, a member or a user in; and revoking what they brought."""

from __future__ import annotations

import time

import click

from slum.cli.base import Invocation, SlumGroup, command, consent
from slum.cli.target import span_s
from slum.errors import ConfigError
from slum.render import clock, quantity, seconds


@click.group(
    "token",
    cls=SlumGroup,
    epilog="  slum token new node workers-1\n  slum token new user ana --role read\n  slum token list",
)
def token() -> None:
    """Tokens that let in a node, a member or a user, once each; and revoking."""


@command(
    "new",
    examples="""
    slum token new node workers-1
    slum token new member --ttl 10m
    slum token new user ana --role admin
    slum token new user ci --role read --json
    """,
)
@click.argument("kind", type=click.Choice(("node", "member", "user")))
@click.argument("subject", required=False, metavar="[NAME]")
@click.option("--role", type=click.Choice(("admin", "read")), help="What a user may do.")
@click.option("--ttl", metavar="TIME", default="1h", show_default=True, help="How long it can be used: 10m, 2h.")
def new(asked: Invocation, kind: str, subject: str | None, role: str | None, ttl: str) -> None:
    """Print a new token: good once, for one key, and said only now.

    NAME is the node's machine as the fleet calls it, the user's name, or the member's (left out: any).
    Standard output is the token alone, so that it can go on by a pipe; hand it over as you would a password.
    """
    if kind != "member" and not subject:
        raise ConfigError(
            f"whose token? name the {'machine' if kind == 'node' else kind}", hint=f"slum token new {kind} NAME"
        )
    if kind == "user" and role is None:
        raise ConfigError(
            "which role? a user may change all (admin) or only look (read)", hint="--role admin or --role read"
        )
    with asked.client() as client:
        made = client.add_token(kind, subject or "", role=role or "", ttl_s=span_s(ttl))
    if asked.json:
        asked.emit(made)
        return
    asked.say(made.token)
    server = made.servers[0] if made.servers else "URL"
    use = {
        "node": f"slum join {server} --tenement {made.subject.rpartition('.')[0]} --token-file -",
        "member": f"slum server join {server} --token-file - --address HOST",
        "user": f"slum context add NAME {server} --token-file -",
    }
    asked.note(
        f"good once, for {seconds(made.expires_at - time.time())}; there, with the token on stdin:\n  {use[kind]}"
    )


@command(
    "list",
    examples="""
    slum token list
    slum token list --json
    """,
)
def list_(asked: Invocation) -> None:
    """List the tokens of late, never their secrets."""
    with asked.client() as client:
        found = client.tokens()
    if asked.json:
        asked.emit(found)
        return
    now = time.time()
    rows = [
        (
            one.id,
            one.kind,
            one.subject or "any",
            one.role,
            one.state,
            clock(one.made_at, now),
            one.made_by,
            clock(one.used_at or one.expires_at, now),
        )
        for one in found
    ]
    none = "there are no tokens; `slum token new` makes one"
    asked.say_table(("ID", "KIND", "FOR", "ROLE", "STATE", "MADE", "BY", "USED OR ENDS"), rows, none=none)


@command(
    "remove",
    examples="""
    slum token remove 3f9a01bc
    """,
)
@click.argument("id")
def remove(asked: Invocation, id: str) -> None:
    """Remove a token, so that it opens nothing any more. What it opened stays: see revoke."""
    with asked.client() as client:
        done = client.remove_token(id)
    if asked.json:
        asked.emit(done)
    else:
        asked.say(f"removed {id}; a certificate that it gave stays until `slum token revoke`")


@command(
    "revoke",
    examples="""
    slum token revoke user/ana
    slum token revoke node/workers-1 --why stolen
    slum token revoke 3dd2e9247984429fef3761547a6a8cc7d40d2c15
    """,
)
@click.argument("what", metavar="SUBJECT|SERIAL")
@click.option("--why", metavar="TEXT", default="", help="The reason, kept with the event.")
def revoke(asked: Invocation, what: str, why: str) -> None:
    """Revoke certificates: user/NAME, node/MACHINE, member/NAME, or one by its serial.

    What is open by them ends within a second; unused tokens of that subject go too. A node's services run on.
    """
    if not consent(asked, f"revoke {what}?"):
        raise ConfigError("not agreed; nothing was changed")
    with asked.client() as client:
        done = client.revoke(subject=what, why=why) if "/" in what else client.revoke(serial=what, why=why)
    if asked.json:
        asked.emit(done)
    else:
        asked.say(f"revoked {quantity(done.certificates, 'certificate')} of {what}")


for _command in (new, list_, remove, revoke):
    token.add_command(_command)
