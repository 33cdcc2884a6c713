"""The API process of a member: it reads state.db, proposes to the ledger and, on the leader, reconciles."""
