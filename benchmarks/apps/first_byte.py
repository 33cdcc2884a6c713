"""Binds $SOCKET_PATH and answers each connection with one byte: the least that a service can do. Run with -S -E."""

import contextlib
import os
import socket

listener = socket.socket(socket.AF_UNIX)
listener.bind(os.environ["SOCKET_PATH"])
listener.listen(64)
while True:
    connection, _ = listener.accept()
    with contextlib.suppress(OSError):  # a probe that only connects
        connection.sendall(b"!")
    connection.close()
