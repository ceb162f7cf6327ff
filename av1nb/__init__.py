import os

__version__ = "0.1.0"

# Threads of OpenMP that wait for each other spin, unless this is set before torch is loaded. On a
# machine with other work the spinning takes the core that the awaited thread needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
