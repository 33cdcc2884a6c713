"""Trust between machines: the fleet's certificate authority, certificates, join tokens. docs/security.md has the picture."""
