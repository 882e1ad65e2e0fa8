"""How the ranks learn that one of them is gone, and what the others do then: end, within a minute, saying which.

torch leaves a rank in a collective whose partner died waiting for 10 to 30 minutes (NCCL, frozen processes), or raises
an error that names a socket (gloo). So every rank has one TCP connection to rank 0, looked after by a thread:

    rank ended by an error   says so, with the error
    process killed           its kernel closes the connection: known at once
    frozen, node or network  no heartbeat for DIST_FAIR_SILENCE seconds. A rank that is merely slow (loading, compiling,
    down                     scoring alone) is not taken for dead: its thread goes on beating while the main one works

What rank 0 learns it tells the others; if rank 0 is the one, each sees that itself. The first loss is the cause and is
what everyone names. A rank whose main thread has not come to its end a third of DIST_FAIR_SILENCE later, since it waits
in a collective, is ended. Nothing is saved on this way: the state may be that of half a step.

Own sockets and not a torch.distributed.TCPStore: a store shows a dead rank only as one that stays silent, W ranks would
have to poll it, and it lives with rank 0's launcher or with rank 0. A few bytes of JSON are what crosses the wire; a
connection that does not begin with the run's random token is dropped.
"""

import json
import os
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from dist_fair.collectives import Communicator
from dist_fair.engine.children import keep_from_children
from dist_fair.engine.preemption import end
from dist_fair.errors import DistFairError, Exit, Preempted, RankLost

ONWARD = "the same command goes on from the last checkpoint"


@dataclass
class _Peer:
    """The other end of a connection. silent: seconds since it was last heard, in which this process was awake."""

    rank: int
    socket: socket.socket
    buffer: bytes = b""
    silent: float = 0.0
    told: str = "starting"


class Watchdog:
    """Watches the other ranks of `comm` from the moment it is made, on all ranks together, until `close`.

    silence: seconds without a heartbeat after which a rank counts as lost.
    Raises DistFairError, on every rank, where one of them cannot reach rank 0.
    """

    def __init__(self, comm: Communicator, silence: float):
        self.comm, self.silence, self.interval = comm, silence, silence / 10
        self.lost: tuple[int, str] | None = None
        self._known, self._closing, self._last_words = threading.Event(), False, None
        self._left = silence / 3  # seconds that the main thread has to end once a rank is lost
        self._wake, woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(woken, selectors.EVENT_READ, None)
        self._peers = {rank: _Peer(rank, found) for rank, found in connect(comm, timeout=max(10.0, silence)).items()}
        for peer in self._peers.values():
            peer.socket.setblocking(False)
            self._selector.register(peer.socket, selectors.EVENT_READ, peer)
        self._sockets = [self._wake, woken, *(peer.socket for peer in self._peers.values())]
        keep_from_children(self)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self, error: BaseException | None) -> None:
        """This rank is at its end; `error`, if there is one, is told to the others.

        Raises RankLost if the error is what the loss of another rank looks like from here.
        """
        if isinstance(error, RuntimeError):  # torch's account of a lost partner, or an error of our own
            self._known.wait(2 * self.interval)
        lost = self.lost if isinstance(error, RuntimeError) else None
        if error is not None and lost is None and not isinstance(error, Preempted):
            self._last_words = {"ended": f"ended: {type(error).__name__}: {_first_line(error)}"}
        self._closing = True
        self._wake.send(b"!")
        self._thread.join(self.interval)
        if lost:
            raise RankLost(self._account()) from None

    def disown(self) -> None:
        """A child's copies would keep the connections open when this process is killed."""
        for one in self._sockets:
            one.close()

    # The thread ------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        before, since_beat = time.monotonic(), self.interval
        while not self._closing:
            if since_beat >= self.interval:
                self._tell({"at": str(self.comm)})
                since_beat = 0.0
            for key, _ in self._selector.select(self.interval - since_beat):
                if key.data is not None:
                    self._hear(key.data)
            now = time.monotonic()
            # A job that was suspended finds an hour gone, and must not take it for silence.
            passed, before = min(now - before, 2 * self.interval), now
            since_beat += passed
            self._judge(passed)
        self._tell(self._last_words or {"bye": True})
        for peer in self._peers.values():
            with suppress(OSError):
                peer.socket.shutdown(socket.SHUT_WR)

    def _hear(self, peer: _Peer) -> None:
        try:
            received = peer.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        *lines, peer.buffer = (peer.buffer + received).split(b"\n")
        peer.silent = 0.0
        for line in lines:
            message = json.loads(line)
            if "at" in message:
                peer.told = message["at"]
            elif "lost" in message:
                self._lose(*message["lost"])
            elif "ended" in message:
                self._lose(peer.rank, message["ended"])
            else:  # bye
                received = b""
        if not received:
            self._selector.unregister(peer.socket)
            del self._peers[peer.rank]
            if not lines or "bye" not in message:
                self._lose(peer.rank, f"died without a word (killed, out of memory?); last heard: {peer.told}")

    def _judge(self, passed: float) -> None:
        for peer in [*self._peers.values()]:
            peer.silent += passed
            if peer.silent > self.silence:
                self._lose(peer.rank, f"has been silent for {self.silence:g} s (frozen, or its node or network is "
                                      f"down); last heard: {peer.told}")  # fmt: skip
        if self.lost:
            self._left -= passed
            if self._left < 0:
                end(Exit.RANK_LOST, f"{self._account()}; {ONWARD}")

    def _lose(self, rank: int, why: str) -> None:
        if self.lost is None:
            self.lost = rank, why
            if self.comm.rank == 0:
                self._tell({"lost": self.lost})
            self._known.set()

    def _tell(self, message: dict) -> None:
        """To whom this rank is connected; a peer that takes nothing is dealt with where it is heard."""
        line = json.dumps(message).encode() + b"\n"
        for peer in self._peers.values():
            with suppress(OSError):
                peer.socket.send(line)

    def _account(self) -> str:
        rank, why = self.lost
        return f"{self.comm}: stopped, since rank {rank} {why}"


def connect(comm: Communicator, timeout: float) -> dict[int, socket.socket]:
    """Connections by rank: on rank 0 to every other one, elsewhere to rank 0.

    MASTER_ADDR is where all ranks have just found rank 0, to make the process group; the port is any free one.
    Raises DistFairError, on every rank, where one of them found none.
    """
    host, found, error = os.environ.get("MASTER_ADDR", "127.0.0.1"), {}, None
    server = _server(host, comm.world) if comm.rank == 0 else None
    address = (server.getsockname()[1], secrets.token_hex(16)) if server else None
    port, token = comm.objects(address, "watchdog")[0]
    try:
        if server:
            found = _accepted(server, token, comm.world, time.monotonic() + timeout)
        else:
            found = {0: socket.create_connection((host, port), timeout)}
            found[0].sendall(json.dumps([token, comm.rank]).encode() + b"\n")
    except OSError as reason:
        error = f"rank {comm.rank}: {reason}"
    if failed := [text for text in comm.objects(error, "watchdog") if text]:
        wrong = DistFairError(f"no connection to rank 0 at {host}:{port} ({failed[0]}): heartbeats need one; open the "
                              "ports between the nodes, or do without heartbeats by DIST_FAIR_SILENCE=0")  # fmt: skip
        wrong.everywhere = True
        raise wrong
    return found


def _server(host: str, world: int) -> socket.socket:
    """Listens on a free port of all interfaces, in the family of the address at which rank 0 is known."""
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server(("", 0), family=family, backlog=world)


def _accepted(server: socket.socket, token: str, world: int, deadline: float) -> dict[int, socket.socket]:
    found: dict[int, socket.socket] = {}
    with server:
        while len(found) < world - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted({*range(1, world)} - {*found})
                raise TimeoutError(f"nothing came from ranks {missing}") from None
            connection.settimeout(1.0)
            with suppress(OSError, ValueError, TypeError):
                given, rank = json.loads(connection.makefile("rb").readline(200))
                if secrets.compare_digest(given, token):
                    found[rank] = connection
    return found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:500]
