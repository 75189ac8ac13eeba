"""Who does tasks."""

from collections.abc import Iterator
from contextlib import contextmanager

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.tasks import Workers


@contextmanager
def connected(
    address: str | None, device: str | None = None, cpus_per_task: int | None = None
) -> Iterator[Workers]:
    """
    Who does tasks: the machines of a Ray cluster, or this process.

    Args:
        address: Address of the cluster, "local" for one that is started on this machine;
            None for this process.
        device: Device of tasks on a cluster: cpu or cuda; by default what it has.
        cpus_per_task: CPU cores, and threads, of a task on a cluster.

    Raises:
        UserError: There is no such cluster, or it has no such machines.
    """
    if address is None:
        if cpus_per_task is not None:
            raise UserError("--cpus_per_task means nothing without --ray")
        yield Workers()
        return
    try:
        import ray  # noqa: F401
    except ImportError as error:
        problem = "--ray needs Ray: pip install 'saelens-scaffold[cluster]'"
        raise UserError(problem) from error
    from saelens_scaffold._util import cluster

    with cluster.connected(address, device, cpus_per_task) as workers:
        yield workers
