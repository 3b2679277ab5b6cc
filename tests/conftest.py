"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# No test asserts an absolute time: on a busy machine an example of microseconds takes as long as a turn of the others,
# and so does making one up. What fails fails again: examples follow from the test, not from chance.
settings.register_profile("shoal", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shoal")
