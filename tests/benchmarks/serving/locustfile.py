"""The load generator: locust, told what to ask and when by a plan.

    python -m locust --headless -f tests/benchmarks/serving/locustfile.py --host URL --plan FILE --result FILE

A user of locust's waits for one answer before it asks again, so that a slow service would be asked less. For an open
loop one user sends everything, each request in a greenlet of its own, when it is due.
"""

from pathlib import Path
from time import perf_counter

import gevent
from gevent.pool import Group
from locust import FastHttpUser, constant, events, task

from tests.benchmarks.serving.plan import Outcome, Plan, Wish, write_outcomes

_REFUSED = 503  # an answer, too


@events.init_command_line_parser.add_listener
def _arguments(parser) -> None:
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)


@events.test_start.add_listener
def _start(environment, **_) -> None:
    environment.plan = Plan.read(environment.parsed_options.plan)
    environment.left = iter(environment.plan.wishes)
    environment.outcomes = []
    environment.began = perf_counter()


@events.test_stop.add_listener
def _stop(environment, **_) -> None:
    write_outcomes(environment.parsed_options.result, environment.outcomes)


class Planned(FastHttpUser):
    """Sends the plan, or as one of several clients its share."""

    wait_time = constant(0)
    concurrency = 10_000  # connections
    connection_timeout = 60.0
    network_timeout = 600.0

    @task
    def work(self) -> None:
        if self.environment.plan.clients is not None:
            self.ask(next(self.environment.left), self.now())
            return
        group = Group()
        for wish in self.environment.left:
            gevent.sleep(max(0.0, wish.due - self.now()))
            group.spawn(self.ask, wish, wish.due)
        group.join()
        self.environment.runner.quit()

    def now(self) -> float:
        return perf_counter() - self.environment.began

    def ask(self, wish: Wish, due: float) -> None:
        sent = self.now()
        path = self.environment.plan.path
        with self.client.post(path, name=wish.kind, json=wish.body, catch_response=True) as response:
            status = response.status_code
            if status == _REFUSED:
                response.success()
        self.environment.outcomes.append(Outcome(wish.kind, due, sent, self.now(), status))
