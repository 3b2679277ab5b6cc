"""What holds for all tests."""

from hypothesis import settings

# No test asserts an absolute time: on a busy machine an example of microseconds takes as long as a turn of the others.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")
