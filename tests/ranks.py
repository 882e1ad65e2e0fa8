"""Runs a function on W real ranks: processes joined by gloo, without a launcher and without ports.

    results = run_ranks(3, function, *arguments)     # function(comm, *arguments) on each; results in rank order

`function` must live at the top of a module (it travels by name), its arguments and result must pickle. Processes come
from a fork server that has imported torch once (0.2 s for four ranks instead of 10), and meet in a file store.
"""

import contextlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT = 60.0  # seconds, from when all ranks run
_START = 120.0  # seconds; the fork server's first import of torch, on a busy machine


def run_ranks(world: int, function: Callable, *arguments: Any, timeout: float = TIMEOUT) -> list:
    """What function(comm, *arguments) returns on each of `world` ranks, in rank order.

    Raises the first error of any rank, with the rank and its traceback as a note; RuntimeError where a rank dies
    without a word; TimeoutError, naming the ranks that are late and the collective they are in, after `timeout`
    seconds. No process is left behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "timm", "accelerate", "pytest", "dist_fair.training"])
    with tempfile.TemporaryDirectory() as folder, _unnamed_main():
        processes, pipes = [], {}
        try:
            for rank in range(world):
                receiver, sender = context.Pipe(duplex=False)
                task = pickle.dumps((function, arguments))
                process = context.Process(target=_rank, args=(rank, world, folder, task, sender), daemon=True)
                process.start()
                sender.close()
                processes.append(process)
                pipes[receiver] = rank
            _await_start(pipes)
            return _collect(pipes, folder, time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _await_start(pipes: dict[Connection, int]) -> None:
    deadline = time.monotonic() + _START
    for pipe, rank in pipes.items():
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"rank {rank} did not start in {_START:g} s")
        with contextlib.suppress(EOFError):  # it died: _collect says so
            pipe.recv_bytes()


def _collect(pipes: dict[Connection, int], folder: str, deadline: float, timeout: float) -> list:
    results, pending = [None] * len(pipes), dict(pipes)
    while pending:
        ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no answer after {timeout:g} s from rank {_whereabouts(folder, pending.values())}")
        # The first error is the cause, the others its consequences. A rank that died is first: it left no time.
        for _, rank, error, trace, result in sorted((_answer(pipe, pending.pop(pipe)) for pipe in ready), key=_time):
            if error is not None:
                error.add_note(f"on rank {rank} of {len(results)}:\n{trace}")
                raise error
            results[rank] = result
    return results


def _answer(pipe: Connection, rank: int) -> tuple:
    try:
        when, error, trace, result = pickle.loads(pipe.recv_bytes())
    except EOFError:
        when, error, trace, result = 0.0, RuntimeError(f"rank {rank} died without a word"), "", None
    return when, rank, error, trace, result


def _time(answer: tuple) -> float:
    return answer[0]


def _rank(rank: int, world: int, folder: str, task: bytes, pipe: Connection) -> None:
    pipe.send_bytes(b"started")

    import torch
    import torch.distributed as dist

    from dist_fair.collectives import Communicator

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    try:
        function, arguments = pickle.loads(task)
        store = dist.FileStore(os.path.join(folder, "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        comm = Communicator()
        _keep_whereabouts(comm, folder)
        answer = pickle.dumps((time.monotonic(), None, "", function(comm, *arguments)))
    except BaseException as error:  # whatever it was, the caller must see it
        answer = _packed(error)
    pipe.send_bytes(answer)
    pipe.close()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def _packed(error: BaseException) -> bytes:
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return pickle.dumps((time.monotonic(), error, trace, None))


def _keep_whereabouts(comm: Any, folder: str) -> None:
    """Leaves the name of the last collective in a file, for the text of a timeout."""
    enter = comm._enter

    def noted(name: str, tensor: Any) -> None:
        with open(os.path.join(folder, f"rank-{comm.rank}"), "w") as file:
            file.write(name)
        enter(name, tensor)

    comm._enter = noted


def _whereabouts(folder: str, ranks: Any) -> str:
    places = []
    for rank in ranks:
        try:
            with open(os.path.join(folder, f"rank-{rank}")) as file:
                places.append(f"{rank} (last collective: {file.read()})")
        except FileNotFoundError:
            places.append(f"{rank} (no collective yet)")
    return ", ".join(places)


@contextlib.contextmanager
def _unnamed_main():
    """Keeps the children from importing the program they were started from (the pytest script) again."""
    main = sys.modules["__main__"]
    path, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    main.__file__, main.__spec__ = None, None
    try:
        yield
    finally:
        main.__file__, main.__spec__ = path, spec
