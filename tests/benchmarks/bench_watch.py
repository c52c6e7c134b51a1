"""What a training step pays for being watched: processor time of all that is noted of a step, and once a second.

    python -m tests.benchmarks.bench_watch

One process; of the exchange between workers only what replaces the broadcast that a step had before. The step that it
is compared with is that of the demo on one worker (128 rows of 64 tokens), at the speed measured in
`tests/benchmarks/results/train_overhead.json`.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from orchestration.clock import Clock
from orchestration.meter import Meter
from orchestration.progress import Progress
from orchestration.spikes import Spikes

ROWS, PASSES, TOKENS, RESULTS = 128, 2, 64, Path(__file__).parent / "results"
SPEED = 30_000  # tokens/s of one worker


def cost(action: Callable[[], object], times: int) -> float:
    """Processor seconds of one `action`, the least of five series."""
    found = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(times):
            action()
        found.append((time.process_time() - began) / times)
    return min(found)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        meter, rule, clock = Meter(), Spikes(10), Clock()
        bits, hidden = torch.rand(ROWS), torch.rand(ROWS)
        times = torch.rand(ROWS, dtype=torch.float64)
        facts = {"phase": "pass 1 of step 100", "workers": 2, "skipped": 0}
        progress = Progress(folder, 0, lambda: {**facts, "spent": clock.spent()})

        def step() -> None:
            with clock.spending("data"):
                pass
            meter.begin(0.0, torch.device("cpu"))
            for part in torch.arange(ROWS).chunk(PASSES):
                meter.add(bits[part], hidden[part], times[part], 1, TOKENS)
            own = meter.own()
            everyone = [torch.empty_like(own)]
            dist.all_gather(everyone, own)
            total, waited = Meter.together(torch.stack(everyone))
            if rule.of_loss(total.loss) is None:
                rule.made(total.loss)
            meter.take(total, waited, 1e9)
            progress.finished(1)

        def before() -> None:
            dist.broadcast(torch.tensor(0), src=0)

        of_step = cost(step, 200) - cost(before, 200)
        of_second = cost(progress._note, 50)
        progress.close()
        dist.destroy_process_group()
    length = ROWS * TOKENS / SPEED
    share = of_step / length + of_second
    known = {"step_us": round(of_step * 1e6), "note_us": round(of_second * 1e6), "share_of_the_demo": round(share, 5)}
    (RESULTS / "watch.json").write_text(json.dumps(known, indent=1) + "\n")
    print(f"a step: {of_step * 1e6:.0f} us of processor time; once a second: {of_second * 1e6:.0f} us")
    print(f"of a step of the demo ({length * 1e3:.0f} ms): {share:.2%}")


if __name__ == "__main__":
    main()
