"""Set-up shared by all tests: the Triton interpreter, hypothesis profiles, reproducible seeds."""

from __future__ import annotations

import os
import zlib

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the processors, as do their children
    share = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, share)))

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.register_profile("deep", max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """One temporary folder for all processes of this run, for what is too costly to build in each."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def pytest_addoption(parser):
    parser.addoption(
        "--slow", choices=("none", "sample", "all"), default="sample", help="slow tests to run: none, every fourth, or all"
    )


def pytest_collection_modifyitems(config, items):
    """Leaves out GPU tests where there is no GPU, and the slow tests that were not asked for."""
    wanted = "all" if "slow" in config.option.markexpr else config.option.slow
    leave_out = [item for item in items if "gpu" in item.keywords and not torch.cuda.is_available()]
    # by name, not by place: adding a test does not change which others run
    share = {"none": 0, "sample": 1, "all": 4}[wanted]
    leave_out += [i for i in items if "slow" in i.keywords and zlib.crc32(i.nodeid.encode()) % 4 >= share]
    config.hook.pytest_deselected(items=leave_out)
    items[:] = [item for item in items if item not in set(leave_out)]
