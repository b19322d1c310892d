"""Tools for the kernels: comparisons, tuning, exact checks, sanitizers. They are not in the wheel."""
