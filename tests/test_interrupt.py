"""Ctrl-C during a call of minutes is noticed at once, and the next call is as good as any."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

# Each takes minutes on two cores.
CALLS = {
    "kmeans": "ops.kmeans(rand(100_000, 512), 2000, init=rand(2000, 512), tol=0, backend='cpu')",
    "duc_loss": "ops.unidirectional_info_nce(rand(300_000, 64), rand(300_000, 64), backend='cpu')",
    "sigmoid_loss": "ops.unidirectional_sigmoid_loss(rand(300_000, 64), rand(300_000, 64), backend='cpu')",
    "additive_shapley": "ops.additive_shapley(rand(20, 64, 500), zeros(64).long(), backend='cpu')",
    "its backward": "ops.additive_shapley(parts, labels, utility='margin', backend='cpu').sum().backward()",
}
PROGRAM = """
from torch import rand, zeros
from mmfast import ops
parts, labels = rand(13, 2000, 100, requires_grad=True), zeros(2000).long()
print("ready", flush=True)
try:
    while True:
        {call}
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(ops.kmeans(rand(50, 3), 50, backend="cpu").inertia.item(), flush=True)
"""


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("cpu_module")
def test_a_long_call_is_interrupted(call):
    program = PROGRAM.format(call=CALLS[call])
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(2)
            process.send_signal(signal.SIGINT)
            # A tenth of a second, on a machine that has nothing else to do.
            out, _ = process.communicate(timeout=10)
        finally:
            process.kill()
    assert out == "interrupted\n0.0\n"
    assert process.returncode == 0
