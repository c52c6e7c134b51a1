"""Jobs: an `md4` command carried out on a Ray cluster.

spec.py       what a job is: verb, arguments, files, name, labels, secrets by reference, retries, time limit
resolve.py    a command as typed here -> a job that stands alone: settings validated, files taken along
paths.py      what becomes of a path that is given here; files that go along
secrets.py    what looks like a secret, and references to secrets
wheel.py      this code as a wheel, named by its content
versions.py   what is installed here and there, compared
package.py    what is sent for a job: wheel, folder, environment, metadata; and the plain command that sends the same
connection.py to a cluster's dashboard: address, token, what is said when it does not answer
client.py     `Jobs`: a cluster's jobs
following.py  a job's log to its end, over lost connections
submission.py one name, one job at a time
listing.py    jobs as a table
run.py        on the cluster: carries out a job; attempts.py its command as a child, with retries and time limit
"""

from typing import TYPE_CHECKING, Any

from orchestration.jobs.spec import VERBS, Job, Retry, State

if TYPE_CHECKING:
    from orchestration.jobs.client import Jobs
    from orchestration.jobs.resolve import resolve

__all__ = ["VERBS", "Job", "Jobs", "Retry", "State", "resolve"]


def __getattr__(name: str) -> Any:
    if name == "Jobs":  # imports Ray
        from orchestration.jobs.client import Jobs

        return Jobs
    if name == "resolve":  # imports torch, to check settings
        from orchestration.jobs.resolve import resolve

        return resolve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
