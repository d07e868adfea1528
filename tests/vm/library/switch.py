"""A wire between machines: an Ethernet switch in the test process, which can be cut and counts what goes over it."""

import contextlib
import selectors
import socket
import struct
import threading


class Switch:
    """Passes frames on between machines; QEMU puts the length before each."""

    def __init__(self):
        self._ports = {}
        self._known = {}
        self._cut = set()
        self._left = None
        self.carried = 0
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        threading.Thread(target=self._run, daemon=True).start()

    def plug(self, name):
        """Return the machine's end of a new cable for the machine ``name``, in place of any that it had."""
        here, there = socket.socketpair()
        here.setblocking(False)
        for side in (here, there):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with self._lock:
            self._forget(self._ports.get(name))
            self._ports[name] = Port(name, here)
            self._selector.register(here, selectors.EVENT_READ, self._ports[name])
        self._wake.send(b".")
        return there

    def cut(self, name):
        """Lose silently all that the machine ``name`` sends or is sent."""
        self._cut.add(name)

    def uncut(self, name):
        """Carry again what it sends and is sent."""
        self._cut.discard(name)
        self._left = None

    def cut_after(self, name, count):
        """Cut the machine ``name`` off when ``count`` more bytes went over the wire."""
        self._left = name, self.carried + count

    def is_cut(self, name):
        """Return whether the machine ``name`` is cut off."""
        return name in self._cut

    def close(self):
        """End it."""
        with self._lock:
            for port in list(self._ports.values()):
                self._forget(port)
        self._wake.close()

    def _forget(self, port):
        if port and self._ports.pop(port.name, None):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(port.socket)
            port.socket.close()

    def _run(self):
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    if not self._woken.recv(100):
                        self._selector.close()
                        self._woken.close()
                        return
                    continue
                with self._lock:
                    self._receive(key.data)

    def _receive(self, port):
        try:
            data = port.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._forget(port)
            return
        for frame in port.frames(data):
            self._pass(port, frame)

    def _pass(self, port, frame):
        target, source = frame[4:10], frame[10:16]
        self._known[source] = port.name
        if port.name in self._cut:
            return
        self.carried += len(frame) - 4
        if self._left and self.carried >= self._left[1]:
            self._cut.add(self._left[0])
            self._left = None
        known = self._known.get(target)
        for other in [known] if known in self._ports else [name for name in self._ports if name != port.name]:
            if other not in self._cut:
                self._ports[other].send(frame)


class Port:
    """One end of a cable."""

    def __init__(self, name, socket):
        self.name, self.socket, self._buffer = name, socket, b""

    def frames(self, data):
        """Return the whole frames, lengths included, that are there after ``data`` came."""
        self._buffer += data
        found, at = [], 0
        while len(self._buffer) >= at + 4:
            end = at + 4 + struct.unpack_from("!I", self._buffer, at)[0]
            if len(self._buffer) < end:
                break
            found.append(self._buffer[at:end])
            at = end
        self._buffer = self._buffer[at:]
        return found

    def send(self, frame):
        """Send a frame whole, or lose it whole, as a switch whose buffer is full does."""
        try:
            sent = self.socket.send(frame)
        except OSError:
            return
        if sent < len(frame):
            self.socket.settimeout(10)
            try:
                self.socket.sendall(frame[sent:])
            except OSError:
                return
            finally:
                self.socket.setblocking(False)
