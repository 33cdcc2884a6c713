"""A tenement's two processes, keeper and agent, and what they decide with; imported as slum.node."""
