"""Operators create, find and destroy machines and start an agent there; imported as slum.operators."""
