"""Settings of the whole test run."""

import os

# Tiny models are slower on several threads than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
