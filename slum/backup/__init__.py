"""Backup and recovery: a mirror of the ledger's state in an object store by Litestream, and the way back from it."""
