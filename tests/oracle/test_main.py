"""The proofs as tests, and what the program says when one fails."""

import subprocess
import sys

import pytest

from tests.oracle import __main__ as program
from tests.oracle import families
from tests.oracle.proof import Proof, examine, holm
from tests.oracle.sampling import draws_of, replaced


@pytest.mark.timeout(900)
def test_every_proof_holds_and_rejects_its_mutants(capsys):
    """30,000 samples each, the seeds of the proofs' names; false-alarm rate 1e-3 each."""
    code = program.main(["--samples", "30000", "--jobs", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0, "\n".join(line for line in lines if line.startswith("FAIL"))
    assert lines[-1] == f"{len(families.proofs())} passed, 0 failed"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_long_form():
    assert program.main(["--long"]) == 0


def test_names_are_unique_and_every_proof_has_a_mutant():
    names = [proof.name for proof in families.proofs()]
    assert len(set(names)) == len(names)
    assert all(proof.mutants for proof in families.proofs())


def fails(claim: float, mutant: float) -> Proof:
    return Proof("a proof", lambda trial: claim, {"a mutant": lambda trial: mutant})


class Family:
    def __init__(self, *proofs: Proof):
        self.proofs = lambda: list(proofs)


@pytest.mark.parametrize("form", [["--jobs", "1"], ["--long", "--jobs", "1"]])
@pytest.mark.parametrize(("claim", "mutant", "passed"), [(0.5, 1e-9, 1), (1e-9, 1e-9, 0), (0.5, 0.5, 0)])
def test_a_false_claim_and_a_mutant_that_is_not_rejected_fail(form, claim, mutant, passed, capsys):
    with replaced(families, "FAMILIES", (Family(fails(claim, mutant)),)):
        assert program.main(form) == 1 - passed
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"{passed} passed, {1 - passed} failed"
    assert ("NOT REJECTED: a mutant" in out) == (mutant > 0.1)
    assert ("again with 4x samples" in out) == (claim < 0.1 and "--long" in form)


def test_a_failure_by_chance_is_forgiven_by_its_repetition(capsys):
    once = Proof("a proof", lambda trial: 1e-9 if trial.samples == 1_000_000 else 0.4, {"a mutant": lambda trial: 0.0})
    with replaced(families, "FAMILIES", (Family(once),)):
        assert program.main(["--long", "--seed", "3", "--jobs", "1"]) == 0
    assert "again with 4x samples 0.4" in capsys.readouterr().out


def test_two_processes_come_to_the_same(capsys):
    """The command as it is typed, with processes of its own, and here in this one."""
    options = ["--only", "guidance", "--samples", "10000"]
    command = [sys.executable, "-m", "tests.oracle", *options, "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert program.main([*options, "--jobs", "1"]) == 0

    def verdicts(out: str) -> list[str]:
        return [line.rpartition(", ")[0] for line in out.splitlines() if line.startswith("PASS")]

    assert verdicts(done.stdout) == verdicts(capsys.readouterr().out)
    assert len(verdicts(done.stdout)) == 4


def test_seeds_are_those_of_the_names():
    """The same counts again for the same seed, other ones for another."""
    (proof,) = families.proofs("guidance, then temperature and top-p")
    first, again, other = (examine(proof, seed, 500).p for seed in (0, 0, 1))
    assert first == again != other


def test_a_proof_that_breaks_off_fails_alone(capsys):
    def breaks(trial):
        raise ValueError("no such law")

    family = Family(Proof("a bad proof", breaks, {"a mutant": breaks}), fails(0.5, 1e-9))
    with replaced(families, "FAMILIES", (family,)):
        assert program.main(["--jobs", "1"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  a bad proof  broken off: ValueError: no such law" in out
    assert out.endswith("1 passed, 1 failed\n")


def test_holm():
    """Ordered p-values against alpha / 4, / 3, / 2, / 1; after the first that holds all do."""
    assert holm([0.3, 0.012, 0.01, 0.026], 0.05) == [False, True, True, False]
    assert holm([0.02, 0.03], 0.05) == [True, True]
    assert holm([0.03, 0.03], 0.05) == [False, False]


def test_nothing_chosen(capsys):
    assert program.main(["--only", "no such proof"]) == 2
    assert "no such proof" in capsys.readouterr().err


def test_samples_of_one_trial_do_not_depend_on_how_many_there_are():
    toy_draws = draws_of(families.first_hitting.TOY)
    proof = families.proofs("samples the model's law, linear")[0]
    few, many = (toy_draws.samples(proof.trial(0, count)) for count in (50, 200))
    assert few.tolist() == many[:50].tolist()
