"""Jobs at their times: a small service that submits them to a Ray cluster (`md4 cron`).

Read in this order: `entry` (what is to run, and when), `schedule` (the times), `records` (what became of each time),
`plan` (what is to be done now, as a pure function), `service` (does it), `store` (where all of it lies).
"""

from orchestration.cron.entry import Entry
from orchestration.cron.records import Record, Status
from orchestration.cron.schedule import Schedule
from orchestration.cron.service import Clock, Service
from orchestration.cron.store import Store

__all__ = ["Clock", "Entry", "Record", "Schedule", "Service", "Status", "Store"]
