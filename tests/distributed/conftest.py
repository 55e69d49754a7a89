import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A tiny Stable Diffusion 1.x pipeline, 16 px."""
    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd1", "sd1")
