import pytest


@pytest.fixture(scope="session")
def smollm2():
    """The built-in model's file, fetched once into the user's own cache."""
    from shoal.checkpoint.builtin import pull

    return pull("smollm2-135m")
