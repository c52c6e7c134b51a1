"""The image's recipe: what hadolint says of it, and that it is made of what the repository is made of."""

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from infra.kuberay.options import RAY
from infra.kuberay.pods import pod_security

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "infra" / "docker" / "Dockerfile"
TEXT = FILE.read_text()


def lint(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["hadolint", "--no-color", file], capture_output=True, text=True, timeout=60)


def stages() -> dict[str, str]:
    """What follows each FROM, by the stage's name."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_hadolint_has_nothing_to_say():
    done = lint(FILE)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "instead", "rule"),
    [
        ("USER 1000:1000", "USER root", "DL3002"),
        ("WORKDIR /home/md4", "WORKDIR home/md4", "DL3000"),
        ('ENTRYPOINT ["tini", "--"]', "ENTRYPOINT tini --", "DL3025"),
    ],
)
def test_a_worse_one_is_told(tmp_path, line, instead, rule):
    assert line in TEXT
    file = tmp_path / "Dockerfile"
    file.write_text(TEXT.replace(line, instead))
    assert rule in lint(file).stdout


def test_both_targets_run_as_the_user_of_the_pods():
    found = stages()
    assert {"cpu", "cuda"} <= found.keys()
    user = pod_security()
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}" in found["base"]
    for target in ("cpu", "cuda"):
        assert f"FROM base AS {target}\n" in TEXT
        assert "USER" not in found[target]


def test_every_install_of_packages_is_of_the_pinned_versions():
    installs = re.findall(r"pip install .*", TEXT)
    assert len(installs) == 2
    for line in installs:
        assert "--constraint /tmp/constraints.txt" in line
        assert line.endswith("/wheels/*.whl")  # ours, and what it requires
    assert "COPY constraints.txt /tmp/constraints.txt" in TEXT
    assert f"ray=={RAY}\n" in (ROOT / "constraints.txt").read_text()  # what manifests say of the image


def test_the_wheel_is_built_of_all_packages_and_nothing_else_comes_along():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = set(re.findall(r"^COPY (\w+) \1$", stages()["wheel"], flags=re.MULTILINE))
    assert copied == packages
    rules = (FILE.parent / "Dockerfile.dockerignore").read_text().split("\n")
    assert "*" in rules
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert allowed == packages | {"pyproject.toml", project["project"]["readme"], "constraints.txt"}
    assert any(fnmatch("md4/.env", rule) for rule in rules if rule.startswith("**"))


def test_its_python_is_one_that_the_project_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [version] = re.findall(r"^ARG PYTHON=(\d+\.\d+)", TEXT, flags=re.MULTILINE)
    assert version == project["project"]["requires-python"].removeprefix(">=")
