"""A launch that runs fewer processes, or fewer threads, than asked for: seen by really launching."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import hf_nose.launch
from hf_nose.launch import LaunchError, check_launch


BIN = Path(sys.executable).parent
CPU_COUNT = min(psutil.cpu_count(logical=False) or psutil.cpu_count(), len(psutil.Process().cpu_affinity()))

# The scripts read launch.py by its path: the package around it would cost every one of their processes seconds.
CHECK = """
import os
import runpy
import sys
from accelerate import PartialState

state = PartialState(cpu="--cpu" in sys.argv)
runpy.run_path(LAUNCH)["check_launch"](state.num_processes)
# In one piece: two processes write to one pipe.
os.write(1, f"as many as asked for: {state.num_processes}\\n".encode())
if state.num_processes > 1:
    state.destroy_process_group()
"""

THREADS = """
import runpy
import torch

runpy.run_path(LAUNCH)["own_the_machine"]()
print("threads:", torch.get_num_threads(), flush=True)
"""


@pytest.fixture
def launch(tmp_path):
    """Run a script under a launcher, in an environment without any: returns its exit code and what it wrote."""

    def run(script, *command, **environ):
        path = tmp_path / "script.py"
        path.write_text(f"LAUNCH = {hf_nose.launch.__file__!r}\n{script}")
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("ACCELERATE_", "MASTER_", "OMP_", "MKL_")) and name not in ("WORLD_SIZE", "RANK")
        }
        # A config file of accelerate's in the home folder would change what is asked for.
        inherited |= {"HF_HOME": str(tmp_path / "hf_home"), "CUDA_VISIBLE_DEVICES": ""}
        words = [str(path) if word == "SCRIPT" else word for word in command]
        words[0] = str(BIN / words[0])
        done = subprocess.run(words, env=inherited | environ, capture_output=True, text=True, timeout=150, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def two_on_cpus(output):
    return "torchrun --standalone --nproc_per_node 2 scripts/run_nose.py --device cpu" in output


# --- what is let through, by the environment alone -------------------------------------------------------------------

PLAIN_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("num_processes", "environ"),
    [
        (1, {}),
        (1, PLAIN_ACCELERATE),
        (1, {"MASTER_ADDR": "node0"}),  # a cluster's, without a launcher
        (1, {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}),  # torchrun of one
        (1, PLAIN_ACCELERATE | {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}),
        (2, {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}),
        (2, PLAIN_ACCELERATE | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}),
        (2, PLAIN_ACCELERATE | {"MASTER_ADDR": "127.0.0.1"}),  # mpirun under accelerate's launcher
    ],
)
def test_a_launch_as_asked_for_passes(num_processes, environ):
    check_launch(num_processes, environ)


def test_the_environment_of_this_process_is_the_default(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(LaunchError, match="4 processes were started .* but only 2"):
        check_launch(2)


def test_a_launch_error_is_a_runtime_error():
    with pytest.raises(RuntimeError, match="asked for several processes and started one"):
        check_launch(1, PLAIN_ACCELERATE | {"MASTER_ADDR": "127.0.0.1"})


# --- what really happens ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accelerate_launch_on_cpus_is_stopped(launch):
    code, output = launch(CHECK, "accelerate", "launch", "--cpu", "--num_processes", "2", "SCRIPT", "--cpu")
    assert code != 0
    assert "LaunchError: accelerate launch was asked for several processes and started one" in output
    assert two_on_cpus(output)


@pytest.mark.slow
def test_a_multi_cpu_config_file_is_stopped(launch, tmp_path):
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_CPU",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 2,
        "use_cpu": True,
    }
    path = tmp_path / "multi_cpu.json"
    path.write_text(json.dumps(config))
    code, output = launch(CHECK, "accelerate", "launch", "--config_file", str(path), "SCRIPT", "--cpu")
    assert code != 0
    assert "LaunchError: accelerate launch was asked for several processes and started one" in output
    assert two_on_cpus(output)


@pytest.mark.slow
def test_torchrun_without_use_cpu_is_stopped(launch):
    code, output = launch(CHECK, "torchrun", "--standalone", "--nproc_per_node", "2", "SCRIPT")
    assert code != 0
    assert "LaunchError: 2 processes were started (WORLD_SIZE) but only 1 found each other" in output
    assert two_on_cpus(output)
    assert "as many as asked for" not in output


@pytest.mark.slow
def test_torchrun_with_use_cpu_runs_two(launch):
    code, output = launch(CHECK, "torchrun", "--standalone", "--nproc_per_node", "2", "SCRIPT", "--cpu")
    assert code == 0, output
    assert output.count("as many as asked for: 2") == 2


@pytest.mark.slow
def test_accelerate_launch_of_one_passes(launch):
    code, output = launch(CHECK, "accelerate", "launch", "--num_processes", "1", "SCRIPT")
    assert code == 0, output
    assert output.count("as many as asked for: 1") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "environ", "expected"),
    [
        (("accelerate", "launch", "--num_processes", "1"), {}, CPU_COUNT),
        (("accelerate", "launch", "--num_processes", "1"), {"OMP_NUM_THREADS": "1"}, 1),
        (("accelerate", "launch", "--num_processes", "1", "--num_cpu_threads_per_process=1"), {}, 1),
        (("python",), {"OMP_NUM_THREADS": "1"}, 1),
    ],
    ids=["launcher_chose", "user_chose_by_variable", "user_chose_by_option", "no_launcher"],
)
def test_one_process_gets_the_threads_that_the_launcher_took(launch, command, environ, expected):
    code, output = launch(THREADS, *command, "SCRIPT", **environ)
    assert code == 0, output
    assert f"threads: {expected}\n" in output
