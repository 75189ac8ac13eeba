"""What benchmarks/scaling.py predicts, against short sums and against two processes."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import test_sharding

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("scaling")


def test_what_is_sent_does_not_depend_on_d_sae(scaling: Any):
    training = scaling.Training(8, 100, 3, 2, 4, 3, 2)
    n, d, r, levels = 4, 8, 2, 3
    numbers = n * d * levels + n * r + r * d + d
    counts = (2**10 - 1) + 2 * (2**11 - 1) + 1 + 2
    assert sum(scaling.sums(training).values()) == 4 * numbers + 8 * (counts + 4)
    assert scaling.sums(training) == scaling.sums(training._replace(d_sae=800))
    # a ring: of all but its own part, each process sends sums twice, and activations once
    summed = sum(scaling.sums(training._replace(n_processes=4)).values())
    expected = 3 / 4 * (2 * summed + 4 * n * d)
    assert scaling.sent(training._replace(n_processes=4)) == expected
    assert scaling.sent(training._replace(n_processes=1)) == 0


def test_a_process_computes_and_holds_its_part(scaling: Any):
    training = scaling.Training(64, 65_536, 32, 0, 128, 1, 1)
    machine = scaling.Machine(1e9, 1e12)
    cluster = scaling.Cluster(machine, 2**40, 1e9, 1e-5)
    assert training.part() == training
    whole = sum(of.seconds(machine) for of in scaling.roofline(training, 1))
    alone = scaling.step_seconds(training, cluster)
    per_token = alone - whole
    assert 0 < per_token < 0.01 * whole
    four = training._replace(n_processes=4)
    computes = scaling.computing(four, cluster)
    assert computes == pytest.approx(whole / 4 + per_token, rel=1e-3)
    communicates = scaling.communicating(four, cluster)
    assert communicates == pytest.approx(scaling.sent(four) / 1e9 + 10e-5)
    assert scaling.step_seconds(four, cluster) == computes + communicates
    # weights, gradients, two moments and square roots of 4 bytes
    state = 20 * 2 * 64 * 65_536
    assert state < scaling.memory(training) < 1.1 * state
    assert state / 4 < scaling.memory(four) < 1.1 * state / 4


def test_limits_are_where_they_are_said_to_be(scaling: Any):
    training = scaling.Training(256, 4096, 32, 8, 512, 4, 4)
    machine = scaling.Machine(1e10, 1e12)
    cluster = scaling.Cluster(machine, 2**30, 1e9, 1e-5)
    widest = scaling.largest_d_sae(training, cluster)
    assert scaling.memory(training._replace(d_sae=int(0.999 * widest))) < 2**30
    assert scaling.memory(training._replace(d_sae=int(1.001 * widest))) > 2**30
    most = scaling.most_processes(training, cluster)
    for n, is_more in ((most, False), (2 * most, True)):
        of = training._replace(n_processes=n)
        communicates = scaling.communicating(of, cluster)
        assert (communicates > scaling.step_seconds(of, cluster) / 2) == is_more


def test_the_command_prints_the_experiment(
    scaling: Any, capsys: pytest.CaptureFixture[str]
):
    scaling.main(["--processes", "1", "8", "--memory", "4"])
    steps, limits, experiment = capsys.readouterr().out.split(":\n\n")[1:]
    rows = [line for line in steps.splitlines() if line.startswith(("| 1 |", "| 8 |"))]
    assert "(too much)" in rows[0]
    assert "(too much)" not in rows[1]
    assert "65,536" in limits
    # on 8 devices, SAEs side by side and one on all of them
    assert experiment.count("| 8 |") == 3


@pytest.mark.parametrize("world_size", [2, 4])
def test_sums_are_those_of_the_sharded_step(scaling: Any, world_size: int):
    # which test_sharding measures
    expected = test_sharding.bytes_of_a_step(world_size, 0, False, torch.float32)
    sizes = (test_sharding.D_IN, test_sharding.D_SAE, 4, test_sharding.RANK)
    training = scaling.Training(*sizes, test_sharding.N_TOKENS, 1, world_size)
    assert sum(scaling.sums(training).values()) == expected
