import numpy as np
import pytest
import tiny

from memfilter.pipelines import load_pipeline


@pytest.fixture(scope="session", params=tiny.FAMILIES)
def pipeline(request, tmp_path_factory):
    """A tiny pipeline of each family, 16 px; Stable Diffusion 2.x predicts v."""
    return load_pipeline(str(tiny.save_pipeline(tmp_path_factory.mktemp("pipeline") / request.param, request.param)))


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    return load_pipeline(str(tiny.save_pipeline(tmp_path_factory.mktemp("pipeline") / "sd1", "sd1")))


@pytest.fixture
def rng():
    return np.random.default_rng(0)
