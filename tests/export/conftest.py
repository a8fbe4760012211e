import pytest

import small_checkpoint


@pytest.fixture(scope="package")
def saved(tmp_path_factory):
    """The path of a small checkpoint."""
    path = tmp_path_factory.mktemp("saved") / "model"
    small_checkpoint.write(path)
    return path
