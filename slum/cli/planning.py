"""`slum plan`: what apply would do, without doing any of it."""

from __future__ import annotations

from slum.cli.base import Invocation, command, file_of, file_option
from slum.cli.deploy import show
from slum.cli.prepare import ask_providers, packed, plan_on, read_fleet, state_without
from slum.errors import EXIT_CHANGES


@command(
    "plan",
    examples="""
    slum plan
    slum plan -f examples/quickstart/slum.toml
    slum plan --json | jq .summary
    """,
)
@file_option
def plan(asked: Invocation, file: str | None, file_option: str | None) -> int | None:
    """Show what apply would add (+), change (~), remove (-), and what is not as declared (!).

    Ends with 0 when there is nothing to do, with 10 when there is. Starts nothing: without a control plane the plan is
    made on an empty machine.
    """
    asked.reach().check()
    loaded = read_fleet(asked, file_of(file, file_option))
    with packed(asked, loaded) as prepared, asked.client() as client:
        present = client.present()
        if present:
            ask_providers(asked, client, prepared.fleet)
        made = plan_on(client.state() if present else state_without(asked.home), prepared.fleet)
    if asked.json:
        asked.emit(made)
    else:
        show(asked, made)
        if not present:
            asked.note("no control plane on this machine yet: `slum apply` starts one")
    return EXIT_CHANGES if made.changes else None
