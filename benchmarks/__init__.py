"""Measurements of the ops against their references and peers: ``python -m benchmarks`` and ``python -m benchmarks.static``."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory announces every start and stop
