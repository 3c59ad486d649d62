"""Processes of one ``torch.distributed`` group on this machine, for distributed methods and what is said of them."""

from __future__ import annotations

import datetime
import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from perturbkit.core import checks

__all__ = ["connected", "run_workers"]


def run_workers(function: Callable[..., Any], n: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Run a function in ``n`` processes joined by the gloo backend, and return what each returned.

    Parameters
    ----------
    function : callable
        Top-level function; called in each process as ``function(*arguments)`` with ``torch.distributed`` initialised, so
        that ``torch.distributed.get_rank()`` tells the processes apart. Function, arguments and results are pickled.
    n : int
        Processes, at least 1.
    timeout : float
        Seconds after which a collective operation, and the whole call, is given up.

    Returns
    -------
    list
        One result a process, by rank.

    Raises
    ------
    ModelError
        If a process fails or the time is over; the others are stopped.

    Notes
    -----
    Processes are spawned, and use one thread each. A script that calls this must guard its entry by
    ``if __name__ == "__main__"``.

    Examples
    --------
    >>> import torch
    >>> run_workers(torch.tensor, 1, 3)
    [tensor(3)]
    """
    if not callable(function):
        raise checks.ArgumentTypeError(
            f"function is a {type(function).__name__}; allowed: a top-level function. Pass the function itself."
        )
    checks.integer("n", n, low=1)
    checks.positive("timeout", timeout)
    with tempfile.TemporaryDirectory() as folder:
        address = (Path(folder) / "rendezvous").as_uri()
        # Not in a "with": its exit would wait for processes that hang.
        pool = ProcessPoolExecutor(n, mp_context=get_context("spawn"))
        try:
            jobs = [pool.submit(_work, function, arguments, address, i, n, timeout) for i in range(n)]
            # All together: the first that fails is told at once, and the time is that of the call.
            done, late = wait(jobs, timeout, FIRST_EXCEPTION)
            for job in done:
                job.result()
            if late:
                raise checks.ModelError(
                    f"{n} processes did not end in {timeout:g} s; allowed: less than the timeout. Raise timeout, or look for "
                    "a collective operation that not all of them reach."
                )
            # Bytes from processes of our own making: nothing from outside is unpickled.
            return [pickle.loads(job.result()) for job in jobs]
        except checks.PerturbkitError:
            raise
        except Exception as error:
            raise checks.ModelError(
                f"a worker failed: {error}; allowed: functions that end without error. Run the function in one process."
            ) from error
        finally:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.join(2)
                if process.is_alive():
                    process.kill()


def connected() -> bool:
    """Return whether this process belongs to a group of ``torch.distributed``.

    Examples
    --------
    >>> connected()
    False
    """
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _work(
    function: Callable[..., Any], arguments: tuple[Any, ...], address: str, rank: int, n: int, timeout: float
) -> bytes:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=n, timeout=limit)
    try:
        # As bytes: tensors would otherwise travel through shared memory that ends with this process.
        return pickle.dumps(function(*arguments))
    finally:
        torch.distributed.destroy_process_group()
