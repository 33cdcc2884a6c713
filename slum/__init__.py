"""slum: a fleet orchestrator for people who overstuff a few servers with many small programs that need isolation."""

__version__ = "0.1.0"
