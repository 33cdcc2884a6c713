"""Members and tenements in network namespaces, under clients and faults, through public doors only: see __main__ and docs/chaos.md."""
