"""The service to compare with: requests that come together are sampled together, and the batch ends as one.

That is all that `@serve.batch` can do for a sampler of many steps: the requests of a batch begin together, and who
comes meanwhile waits for the next one. Model, samplers and the route's body are those of the service itself.
"""

import asyncio
from pathlib import Path
from time import perf_counter
from typing import Any

import fastapi
import torch
from ray import serve
from starlette.responses import Response

from md4.errors import UserError
from md4.samplers import Job, wording
from orchestration import sampling
from orchestration.runs import load_model
from orchestration.sampling import Answer, Request
from orchestration.serving.messages import Drawn, SampleRequest, SampleResponse, Timings

NAME, PREFIX = "batched", "/batched"
_ROWS = 64  # that go through the network together: more than a batch has here

api = fastapi.FastAPI()


@serve.ingress(api)
class Batched:
    """One replica."""

    def __init__(self, run: Path, max_batch_size: int, batch_wait_ms: float) -> None:
        torch.set_num_threads(1)
        self.loaded = load_model(run)
        self._sample.set_max_batch_size(max_batch_size)  # type: ignore[attr-defined]
        self._sample.set_batch_wait_timeout_s(batch_wait_ms / 1e3)  # type: ignore[attr-defined]

    @api.post("/v1/samples", response_model=SampleResponse)
    async def samples(self, body: SampleRequest) -> Any:
        arrived = perf_counter()
        changes = {} if body.sampling is None else body.sampling.model_dump(exclude_unset=True)
        request = Request(
            prompt=body.prompt,
            count=body.count,
            length=body.length,
            seed=sampling.random_seed() if body.seed is None else body.seed,
            settings=wording.change(self.loaded.config.sampling, changes),
        )
        answer: Answer | UserError
        answer, queue_s, sample_s = await self._sample((request, sampling.prepare(self.loaded, request), arrived))  # type: ignore[misc, arg-type]
        if isinstance(answer, UserError):
            raise fastapi.HTTPException(500, str(answer))
        found = SampleResponse(
            samples=[Drawn(**sample.model_dump()) for sample in answer.samples],
            model=answer.model,
            settings=answer.settings,
            timings=Timings(
                queue_ms=round(1e3 * queue_s, 3),
                sample_ms=round(1e3 * sample_s, 3),
                total_ms=round(1e3 * (perf_counter() - arrived), 3),
            ),
            calls=answer.network_calls,
            draws=answer.draws,
            draws_mode=answer.mode,
            counted=answer.counted,
        )
        return Response(found.model_dump_json(), media_type="application/json")

    @serve.batch
    async def _sample(self, items: list[tuple[Request, Job, float]]) -> list[tuple[Answer | UserError, float, float]]:
        # In a thread, so that the next batch can gather meanwhile.
        return await asyncio.to_thread(self._run, items)

    def _run(self, items: list[tuple[Request, Job, float]]) -> list[tuple[Answer | UserError, float, float]]:
        began = perf_counter()
        requests, jobs = [request for request, _, _ in items], [job for _, job, _ in items]
        answers = sampling.answer(self.loaded, requests, jobs, _ROWS)
        took = perf_counter() - began
        return [(answer, began - arrived, took) for answer, (_, _, arrived) in zip(answers, items, strict=True)]


def application(run: Path, max_batch_size: int, batch_wait_ms: float, queue: int, num_cpus: float) -> serve.Application:
    """The Serve application; queue: requests that may wait beside the batch under way and the one that gathers."""
    deployment = serve.deployment(
        Batched,
        num_replicas=1,
        max_ongoing_requests=2 * max_batch_size,
        max_queued_requests=queue,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        ray_actor_options={"num_cpus": num_cpus},
    )
    return deployment.bind(run, max_batch_size, batch_wait_ms)
