"""Every rank learns at once that another one is gone, and which."""

import socket
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest

from dist_fair.engine import watchdog
from dist_fair.engine.watchdog import Watchdog
from dist_fair.errors import DistFairError, Preempted, RankLost
from tests.ranks import run_ranks

SILENCE = 5.0


def ending(comm, errors):
    """What `close` raises on this rank, as text; errors: by rank, what ends it, the first first."""
    comm.place, comm.last = "step 7", "summaries/sum"
    watch = Watchdog(comm, SILENCE)
    comm.barrier("watched")
    comm.last = "summaries/sum"
    error = errors.get(comm.rank)
    if error is None or isinstance(error, RuntimeError):
        watch._known.wait(1.0 if not errors else 10.0)
    try:
        watch.close(error)
    except RankLost as lost:
        return str(lost)
    return watch.lost


def test_an_error_of_a_rank_is_the_reason_everywhere():
    """The second error is what gloo makes of the first; that a rank that ends well is not told is no matter."""
    first, failed, last = run_ranks(3, ending, {
        0: RuntimeError("Connection closed by peer"), 1: ValueError("planted\nmore"), 2: RuntimeError("the same"),
    })  # fmt: skip
    assert failed is None
    where = "step 7, collective 'summaries/sum': stopped, since rank 1 ended: ValueError: planted"
    assert first == f"rank 0 of 3, {where}"
    assert last == f"rank 2 of 3, {where}"


def test_an_error_of_rank_0_is_the_reason_everywhere():
    failed, other = run_ranks(2, ending, {0: KeyError("planted"), 1: RuntimeError("Connection closed by peer")})
    assert failed is None
    assert other.endswith("since rank 0 ended: KeyError: 'planted'")


@pytest.mark.parametrize("error", [None, Preempted("asked")])
def test_nothing_is_lost_where_all_end_together(error):
    assert run_ranks(2, ending, {0: error, 1: error} if error else {}) == [None, None]


def hung(comm):
    """Whom this rank takes for lost after a jump of the clock; and what it says where its main thread does not end."""
    ended, said, jump = threading.Event(), [], [0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + jump[0])
    end = mock.patch.object(watchdog, "end", lambda code, text: (said.append((int(code), text)), ended.set()))
    with mock.patch.object(watchdog, "time", clock), end:
        watch = Watchdog(comm, 2.0)
        comm.barrier("watched")
        jump[0] = 3600  # the job was suspended for an hour
        time.sleep(0.5)
        jumped = watch.lost
        comm.barrier("jumped")
        if comm.rank == 1:
            watch.close(ValueError("planted"))
            return jumped, None
        comm.place, comm.last = "step 7", "summaries/sum"
        assert ended.wait(10)
        watch.close(None)
    return jumped, said[0]


def test_a_rank_that_does_not_end_is_ended_and_a_suspended_job_is_not():
    (jumped, said), (other, _) = run_ranks(2, hung)
    assert (jumped, other) == (None, None)
    code, text = said
    assert code == 74
    assert text.startswith("rank 0 of 2, step 7, collective 'summaries/sum': stopped, since rank 1 ended: ValueError")


def connected(comm, disturb):
    """Connections made while others knock at the port; or none, since rank 1 cannot come."""
    real = socket.create_connection

    def knock(address, *arguments):
        if disturb == "unreachable":
            raise ConnectionRefusedError(111, "Connection refused")
        for words in (b"GET / HTTP/1.1\r\n\r\n", b'["wrong", 1]\n'):
            stranger = real(address)
            stranger.sendall(words)
        return real(address, *arguments)

    with mock.patch.object(socket, "create_connection", knock):
        try:
            found = watchdog.connect(comm, timeout=1.0)
        except DistFairError as error:
            return str(error), error.everywhere
    if comm.rank == 0:
        found[1].setblocking(True)
        return found[1].recv(5)
    found[0].sendall(b"mine\n")
    return sorted(found)


def test_strangers_at_the_port_are_sent_away():
    assert run_ranks(2, connected, "strangers") == [b"mine\n", [0]]


def test_a_rank_that_cannot_come_is_told_by_all():
    (one, everywhere), other = run_ranks(2, connected, "unreachable")
    assert everywhere
    assert other[0] == one
    assert "no connection to rank 0 at 127.0.0.1:" in one
    assert "(rank 0: nothing came from ranks [1])" in one
    assert "DIST_FAIR_SILENCE=0" in one
