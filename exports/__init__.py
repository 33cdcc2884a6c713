"""Renderings of a fleet for other systems; imported as slum.exports."""
