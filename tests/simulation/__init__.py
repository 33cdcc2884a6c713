"""Simulation of several ledger members: the real PySyncObj and the real files, under a simulated clock, dice and network.

One seed is one schedule. `python -m tests.simulation --count 1000 --seed 1` runs many; a failing seed replays alone.
"""
