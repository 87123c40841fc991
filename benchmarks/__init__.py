"""Benchmarks of jaxwarp against the time of a copy and against other libraries: `make bench`.

`python -m` puts this checkout in front of the installed packages; it is the installed jaxwarp,
with its kernels, that is measured.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
