"""What each command does within its transaction: a table of commands, and those that concern the ledger itself.

Everything here is deterministic: it sees the Turn and the command, nothing else.
"""

from __future__ import annotations

from slum.errors import SlumError
from slum.ledger import access, hosts, schema
from slum.ledger.commands import (
    PROTOCOL,
    AddToken,
    AnyCommand,
    ForgetHost,
    Intent,
    LeaderStarted,
    NoteCertificate,
    Outcome,
    PinHost,
    Record,
    RemoveToken,
    Result,
    Revoke,
    Seal,
    SetAuthority,
    SetDesired,
    SetOverride,
    SetProtocol,
    UseToken,
)
from slum.ledger.desired import apply_desired, apply_override
from slum.ledger.events import KIND
from slum.ledger.machines import apply_intent, apply_outcome
from slum.ledger.turn import Turn

NOTES_MAX = 200


class StateFailed(SlumError):
    """state.db could not be written, or an entry is of a newer slum: the process must end."""


def perform(turn: Turn, command: AnyCommand) -> Result:
    """Apply *command*; anything but StateFailed that it raises is the command's own fault, the same on every member."""
    match command:
        case SetDesired():
            return apply_desired(turn, command)
        case SetOverride():
            return apply_override(turn, command)
        case Intent():
            return apply_intent(turn, command)
        case Outcome():
            return apply_outcome(turn, command)
        case Record():
            return _record(turn, command)
        case PinHost():
            return hosts.pin_host(turn, command)
        case ForgetHost():
            return hosts.forget_host(turn, command)
        case SetAuthority():
            return access.set_authority(turn, command)
        case AddToken():
            return access.add_token(turn, command)
        case UseToken():
            return access.use_token(turn, command)
        case RemoveToken():
            return access.remove_token(turn, command)
        case NoteCertificate():
            return access.note_certificate(turn, command)
        case Revoke():
            return access.revoke(turn, command)
        case SetProtocol():
            return _set_protocol(turn, command)
        case _:
            raise TypeError(type(command).__name__)


def _record(turn: Turn, command: Record) -> Result:
    if len(command.events) > NOTES_MAX:
        return turn.rejected("invalid", f"{len(command.events)} events at once; at most {NOTES_MAX} are taken")
    strange = next((note.kind for note in command.events if not KIND.fullmatch(note.kind)), None)
    if strange is not None:
        return turn.rejected("invalid", f"{strange[:80]!r} is not a kind of event")
    turn.events.add_notes(command.events, turn.actor)
    return turn.done()


def start_leader(turn: Turn, command: LeaderStarted) -> Result:
    """From here on the header's term fences every older one."""
    turn.leader = f"{command.member}/{command.run}"
    header = turn.header
    after = {"generation": header.generation, "epoch": header.epoch, "term": header.term}
    turn.events.add("leader_started", f"member:{command.member}", actor=turn.actor, after=after)
    return turn.done()


def seal(turn: Turn, command: Seal) -> Result:
    """End the epoch: *turn.sealed* tells state.apply to begin the next one with *turn.members*."""
    if not command.members or len({member.id for member in command.members}) != len(command.members):
        return turn.rejected("invalid", "an epoch needs members, each once")
    after = {"epoch": turn.header.epoch + 1, "members": [member.id for member in command.members]}
    turn.events.add("epoch_sealed", f"epoch:{turn.header.epoch}", actor=turn.actor, why=command.why, after=after)
    turn.members = command.members
    turn.sealed = True
    return turn.done()


def _set_protocol(turn: Turn, command: SetProtocol) -> Result:
    if command.version < turn.protocol:
        return turn.rejected("invalid", f"the protocol is {turn.protocol} already")
    if command.version > PROTOCOL:
        raise StateFailed(
            f"the ledger moves to protocol {command.version}, this slum speaks {PROTOCOL}",
            hint="install the version of slum that the other members run",
        )
    if command.version != turn.protocol:
        turn.events.add(
            "protocol_set",
            "cluster:protocol",
            actor=turn.actor,
            before={"protocol": turn.protocol},
            after={"protocol": command.version},
        )
        turn.protocol = command.version
        schema.create_tables_of(turn.db, command.version)
    return turn.done()
