"""The same function over many jobs, in several processes, results in the order of the jobs."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dist_fair.errors import DistFairError

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # (jobs done, jobs in all)


def no_progress(done: int, total: int) -> None:
    """Shows nothing."""


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int = 1,
    progress: Progress = no_progress,
    finished: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """[function(job) for job in jobs], in up to `workers` processes; the first job's error (in order) is raised.

    `finished` is called here, in the order of the jobs, with each result as soon as it and those before are there.
    Processes are spawned, not forked (a fork of a process with threads may hang), so function and jobs are pickled and
    a script that calls this guards its entry by `if __name__ == "__main__"`. With one worker everything runs here.
    """
    results: list[Result] = []
    progress(0, len(jobs))

    def take(result: Result) -> None:
        results.append(result)
        finished(result)
        progress(len(results), len(jobs))

    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            take(function(job))
        return results
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context)
    try:
        for future in [executor.submit(function, job) for job in jobs]:
            take(future.result())
    except BrokenProcessPool as error:
        raise DistFairError(
            f"a worker process was killed after {len(results)} of {len(jobs)} jobs (out of memory?): "
            "use fewer workers; what is finished is kept where the command can resume"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)
    return results
