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


@pytest.fixture(scope="session")
def zero_snr(tmp_path_factory):
    """Stable Diffusion 2.x at zero terminal SNR: its first step tells nothing of the noise."""
    path = tiny.save_pipeline(tmp_path_factory.mktemp("pipeline") / "zero", "sd2", rescale_betas_zero_snr=True)
    made = load_pipeline(str(path))
    made.scheduler.register_to_config(timestep_spacing="trailing")
    return made


@pytest.fixture
def broken(sd1):
    """A denoiser that answers NaN for the last picture of every batch."""

    def spoil(module, args, output):
        sample = output[0].clone()
        sample[-1] = float("nan")
        return (sample,)

    handle = sd1.unet.register_forward_hook(spoil)
    yield sd1
    handle.remove()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
