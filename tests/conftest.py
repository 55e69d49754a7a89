import os

os.environ["HF_HUB_OFFLINE"] = "1"
# one thread, here and in what is started: accelerate gives ranks without it a thread for every core, and two tests at a time
# wait for each other's cores
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402


# files that take long, those that compute and those that wait by turns: what begins last is waited for by all
LONGEST = [
    "test_sweep", "test_options", "test_launch", "test_average", "test_interruptions", "test_same_update",
    "test_evidence_ranks", "test_laion_end_to_end", "test_wandb", "test_cache_processes", "test_cache", "test_streaming", "test_hostile", "test_app",
    "test_scenes_base", "test_evidence_run", "test_parity", "test_bad_input", "test_benchmarks", "test_evaluate",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))  # stable


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps its settings for the whole process; here every test brings its own."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _fresh_wandb():
    """wandb leaves the address of its service in the environment, and what later tests start would join it."""
    yield
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture
def tiny_unet():
    """Factory: tiny_unet(seed, **config) is a UNet2DConditionModel of 200k weights in train mode."""
    import tiny
    from diffusers import UNet2DConditionModel

    def make(seed: int = 0, **config) -> UNet2DConditionModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return UNet2DConditionModel(**tiny.UNET | config).train()

    return make


@pytest.fixture
def tiny_batch():
    """Factory: tiny_batch(seed, size) gives latents [B, 4, 8, 8], timesteps [B], embeddings [B, 5, 16], target."""

    def make(seed: int = 0, size: int = 4):
        g = torch.Generator().manual_seed(seed)
        latents, target = torch.randn(2, size, 4, 8, 8, generator=g)
        return latents, torch.randint(1000, (size,), generator=g), torch.randn(size, 5, 16, generator=g), target

    return make


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory):
    """Clipart scenes as a user would prepare them: 4 duplicates 20 times each and 100 distinct samples."""
    from memfilter.data.experiment import prepare_scenes

    return prepare_scenes(tmp_path_factory.mktemp("data") / "scenes", seed=5, duplicates=4, repeats=20, distinct=100)
