"""The command line: one file a command family, imported only when its command runs."""
