"""What holds for all tests."""

import os

from hypothesis import HealthCheck, settings

# No test asserts an absolute time: on a busy machine an example of microseconds takes as long as a turn of the others,
# and so does making one up. What fails fails again: examples follow from the test, not from chance.
settings.register_profile("shoal", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shoal")

INTERPRET = "TRITON_INTERPRET"
# Triton settles as it is imported, by whichever module is first, whether its own functions are compiled or interpreted.
# Only tests/kernels wants them interpreted, and sets this again as its tests run; a GPU compiles them.
if not os.path.exists("/dev/nvidiactl"):
    os.environ[INTERPRET] = "1"


def pytest_collection_finish() -> None:
    """All kernels are defined. Tests find no Triton on a CPU, as users do."""
    os.environ.pop(INTERPRET, None)
