"""Python in a process of its own."""

import os
import subprocess
import sys


def fresh_process(code, **environment):
    command = [sys.executable, "-P", "-c", code]
    environment = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"} | environment
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout
