"""An executor on a Dask cluster, for work that is handed to workers as picklable tasks (extra ``cluster``)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from perturbkit.core import checks

__all__ = ["check_address", "on_cluster"]

_CONNECT_SECONDS = 20


@contextmanager
def on_cluster(address: str) -> Iterator[Executor]:
    """Connect to a scheduler and return an executor of its workers.

    A task whose worker dies is run again elsewhere, up to three times; what a task itself raises is not.

    Raises
    ------
    ArgumentError
        If the address is not one, or no scheduler or worker answers there.
    MissingExtraError
        If ``distributed`` is not installed.
    """
    check_address(address)
    distributed = checks.extra("distributed", "cluster")
    client = None
    try:
        client = distributed.Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
    except (OSError, TimeoutError) as error:
        if client is not None:
            client.close()
        raise checks.ArgumentError(
            f"cluster is {address!r}, where {'no worker' if client else 'no scheduler'} answers ({error}); allowed: "
            "a Dask scheduler with workers. Start 'dask scheduler', and 'dask worker' with its address."
        ) from None
    # pure=False: a second run must not be answered from the scheduler's memory.
    executor = client.get_executor(pure=False, retries=3)
    try:
        yield executor
    finally:
        executor.shutdown(wait=False)
        client.close()


def check_address(address: str) -> None:
    """Refuse what is not the address of a scheduler.

    Raises
    ------
    ArgumentError
        If it is not tcp://HOST:PORT.
    """
    if not re.fullmatch(r"(tcp|tls)://[^/\s]+:\d+", address):
        raise checks.ArgumentError(
            f"cluster is {address!r}; allowed: tcp://HOST:PORT. Pass the address that the Dask scheduler prints."
        )
