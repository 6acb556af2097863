"""The host benchmark: it measures both, and leaves the kernels as they were."""

import json

import pytest
import torch

from benchmarks import host
from gac.ops.cuda import launch

SMALL = ["--time-steps", "2", "--width", "4", "--depth", "1", "1", "1", "--num-classes", "3", "--warmup", "1"]


def test_where_there_is_a_gpu_it_runs_on_the_cpu_as_written_in_the_docs():
    assert host.PARSER.parse_args([]).device == "cpu"


@pytest.mark.c_kernels
def test_measures_and_reports(tmp_path, capsys):
    file = tmp_path / "result.json"
    threads = torch.get_num_threads()
    status = host.main([*SMALL, "--rounds", "2", "--steps", "3", "--json", str(file)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    training, evaluation = json.loads(file.read_text())["steps"]
    assert (training["step"], evaluation["step"]) == ("training", "evaluation")
    for step in (training, evaluation):
        assert len(step["whole"]["samples_ms"]) == len(step["torch"]["samples_ms"]) == 6
        assert step["ours_ms"] == pytest.approx(step["whole"]["median_ms"] - step["torch"]["median_ms"])
    # The gate, and two layers for each of three blocks, of which the last pools.
    assert evaluation["launches"] == 7 < training["launches"]
    assert launch._cpu_launcher is None
    assert torch.get_num_threads() == threads
