"""The replicated log and the SQLite state that it produces; nothing outside this package knows PySyncObj."""
