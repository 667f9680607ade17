"""Two processes on the CPU, as torchrun starts them: the gradient, a whole run and a clean stop are those of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import SEQ2SEQ, VARIANTS, difference, equal, weights, whole_gradient
from two_processes import RESUMES

from hfcompress import load

HERE = Path(__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
needs_resume = pytest.mark.skipif(not RESUMES, reason="this transformers cannot resume on several CPU processes")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc_per_node", "2", str(HERE / "two_processes.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def found(output):
    return torch.load(output / "found.pt", weights_only=False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_the_gradient_is_that_of_one_process(found, kind, variant):
    assert difference(found["gradients"][kind, variant], whole_gradient(kind, variant)) < 1e-6


def test_the_gradient_with_accumulation_too(found):
    assert difference(found["accumulated"], found["gradients"]["marian", "both"]) < 1e-6


def test_latents_agree_though_the_models_were_built_apart(found):
    agreed = found["whole run"]["ranks agree"]
    assert len(agreed) == 6 + 3 * RESUMES and all(agreed)


def test_a_whole_run_evaluates_and_saves_its_best(found, output):
    run = found["whole run"]
    assert sum("eval_loss" in entry for entry in run["history"]) == 6
    wanted = load_file(output / "whole" / run["best"] / "model.safetensors")
    loaded = weights(load(output / "whole" / "file"))
    assert equal({name: loaded[name] for name in wanted}, wanted)


@needs_resume
def test_a_whole_run_resumes_exactly(found):
    assert found["whole run"]["resumed"]


def test_a_signal_to_one_process_stops_both_after_a_checkpoint(found):
    assert found["stopped"] == {"stopped": [True, True], "kept": ["checkpoint-2"]}


@needs_resume
def test_both_go_on_from_there(output):
    files = [(output / name / "model.hfcompress.safetensors").read_bytes() for name in ("stopped", "unstopped")]
    assert files[0] == files[1]


def test_each_row_of_a_stream_is_read_by_one_process(found):
    rows = found["streamed"]["rows"]
    assert len(rows) == len(set(rows)) == 60


@needs_resume
def test_a_streamed_stage_goes_on_as_if_it_had_not_been_stopped(found):
    streamed = found["streamed"]
    assert streamed["interrupted"] and streamed["same"] and streamed["steps"] == list(range(1, 10))
