"""A TCP proxy that a test points elsewhere, cuts, or makes swallow everything while it looks alive."""

import contextlib
import socket
import threading


class Proxy:
    """Listens on `port` of 127.0.0.1 and leads each new connection to `target`: a socket's path, or host and port.

    `swallow()`: from now on nothing that comes, from either side, is passed on; connections stay open and are
    accepted, and TCP acknowledges all of it.  `lead_to(target)`: new connections go there and are passed on;
    those that were swallowed stay so.  A context manager.
    """

    def __init__(self, target):
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._swallows = False
        self._links = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.close()
        self.cut()

    def swallow(self):
        self._swallows = True
        for link in self._links:
            link.passes = False

    def lead_to(self, target):
        self.target, self._swallows = target, False

    def cut(self):
        """End every connection."""
        for link in self._links:
            link.close()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                self._links.append(_Link(self._listener.accept()[0], None if self._swallows else self.target))


class _Link:
    def __init__(self, client, target):
        self.passes = target is not None
        self.sockets = [client]
        if target is not None:
            server = socket.socket(socket.AF_UNIX if isinstance(target, str) else socket.AF_INET)
            self.sockets.append(server)
            try:
                server.connect(target)
            except OSError:
                self.close()
                return
            self._pump(server, client)
        self._pump(client, self.sockets[-1])

    def _pump(self, source, sink):
        threading.Thread(target=self._run, args=(source, sink), daemon=True).start()

    def _run(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.passes:
                    sink.sendall(data)
            if self.passes:
                self.close()

    def close(self):
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
