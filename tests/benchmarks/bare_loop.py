"""The loop that the trainer is measured against: the same network, optimizer and average, and nothing else.

    python -m tests.benchmarks.bare_loop PRESET DATA WORKERS STEPS
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.benchmarks.bare_loop ...

Batches lie in memory; times and masks come from torch's generator; more than one process means DistributedDataParallel.
Prints the tokens/s of all processes together, one JSON list over windows of WINDOW steps.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist

from md4.model import build
from md4.objectives import bits_per_token
from orchestration.config import load
from orchestration.optimizer import AdamWithEma, learning_rate
from orchestration.worker import compute_dtype
from pipelines.shards import ShardSet

WINDOW = 5


def main(preset: str, data: str, workers: int, steps: int, *overrides: str) -> None:
    torch.set_num_threads(1)
    config = load(preset, overrides)
    rank = int(os.environ.get("RANK", 0))
    if workers > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(rank)
    model = build(config.model, compute=compute_dtype(config.train.precision, torch.device("cpu")), seed=0)
    network = torch.nn.parallel.DistributedDataParallel(model) if workers > 1 else model
    options = config.optimizer
    optimizer = AdamWithEma(
        model.parameters(),
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        ema=options.ema,
        fused=True,
    )
    shards = ShardSet(data, "train")
    share = config.train.batch_size // workers
    rows = torch.as_tensor(shards.read(torch.arange(min(shards.rows, share * 16)).numpy()), dtype=torch.int64)
    length = config.model.length
    windows = []
    for step in range(steps):
        if step % WINDOW == 0:
            began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.learning_rate, options.warmup, steps, options.schedule)
        tokens = rows[torch.arange(share * step, share * (step + 1)) % len(rows)]
        t = (torch.rand(()) + torch.arange(share) / share) % 1
        loss = bits_per_token(network(tokens, t, torch.rand(share, length)).optimised, length).mean()
        loss.backward()
        if options.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % WINDOW == WINDOW - 1:
            windows.append(WINDOW * share * workers * length / (time.perf_counter() - began))
    if rank == 0:
        print(json.dumps(windows))
    if workers > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
