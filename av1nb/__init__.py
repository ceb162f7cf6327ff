import os

__version__ = "0.1.0"

# Threads of OpenMP that wait for each other spin for a while, and on a machine with other work
# they take the core that the awaited thread needs. Two thousand turns instead of three hundred
# thousand; it counts only if set before PyTorch is loaded. See the benchmark of a busy machine.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
