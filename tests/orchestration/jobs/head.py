"""A Ray cluster of one machine as `ray start --head` makes it, with a dashboard and a token, beside all others here."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from orchestration.cluster import ENVIRONMENT
from orchestration.phases import free_ports

_PORTS = (
    "port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port",
    "runtime-env-agent-port", "node-manager-port", "object-manager-port", "ray-client-server-port",
)  # fmt: skip
CPUS = 4  # logical ones, that it gives out
BYTES = 150 << 20  # of its object store


class Head:
    """The cluster. Its processes find our packages in the jobs' wheels alone: where they start there is no checkout."""

    def __init__(self, token: str, ports: dict[str, int] | None = None, cpus: int = CPUS, **environment: str):
        self.folder = Path(tempfile.mkdtemp(prefix="mj"))  # short: Ray's sockets lie below it
        self.token = self.folder / "token"
        self.write_token(token)
        self.ports = ports or dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        self._environment = {**os.environ, **ENVIRONMENT, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        self._environment["RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR"] = "0"
        self._environment |= self.access(self.token) | environment
        for name in ("PYTHONPATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MD4_CACHE"):
            self._environment.pop(name, None)
        self._log = self.folder / "log"
        self._start(cpus)

    def _start(self, cpus: int) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--num-cpus", str(cpus), "--object-store-memory", str(BYTES), "--temp-dir", str(self.folder / "r")]
        command += ["--dashboard-host", "127.0.0.1", "--node-ip-address", "127.0.0.1", "--disable-usage-stats"]
        command += [f"--{name}={port}" for name, port in self.ports.items()]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                command, env=self._environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + 120
        while not self._answers():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        token = {"Authorization": f"Bearer {self.token.read_text()}"}
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.address}/api/jobs/", headers=token, timeout=5).status_code == 200
        return False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.ports['dashboard-port']}"

    def write_token(self, token: str) -> None:
        self.token.write_text(token)
        self.token.chmod(0o600)

    @staticmethod
    def access(token: Path) -> dict[str, str]:
        """The environment of one who has this token."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def kill(self) -> None:
        """The machine is gone: SIGKILL to all of it."""
        everything = self._everything()
        for process in everything:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(everything, timeout=20)

    def close(self) -> None:
        """End all of it, and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _everything(self) -> list[psutil.Process]:
        """All processes of the cluster; of jobs, too, which are sessions of their own."""
        found = []
        with suppress(psutil.NoSuchProcess):
            head = psutil.Process(self.process.pid)
            found = [head, *head.children(recursive=True)]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(self.folder) in " ".join(process.cmdline()) and process not in found:
                    found += [process, *process.children(recursive=True)]
        return found
