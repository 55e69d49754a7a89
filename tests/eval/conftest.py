import pytest
import tiny

from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, ModelConfig, TrainConfig
from memfilter.data import scenes
from memfilter.train.loop import train


def fine_tune(run_dir, base, data):
    """A real run of 16 px pictures, short as can be."""
    config = Config(
        run_dir=str(run_dir),
        model=ModelConfig(path=str(base)),
        data=DataConfig(path=str(data)),
        filter=FilterConfig(tau=60.0),
        train=TrainConfig(samples=24, batch_size=8, ema_half_life=0),
        log=LogConfig(gallery=0),
    )
    train(config, progress=False)
    return run_dir


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny pipeline of 16 px."""
    return tiny.save_pipeline(tmp_path_factory.mktemp("models") / "sd1", "sd1")


@pytest.fixture(scope="session")
def scenes_run(tmp_path_factory, base, scenes_dir):
    """On clipart scenes, 4 duplicates and 100 others, with an index."""
    return fine_tune(tmp_path_factory.mktemp("runs") / "scenes", base, scenes_dir)


@pytest.fixture(scope="session")
def folder_run(tmp_path_factory, base):
    """On 12 pictures of which nothing is known: a folder of oblong ones, hostile captions among them."""
    folder = tmp_path_factory.mktemp("data") / "folder"
    folder.mkdir()
    for i in range(12):
        picture = scenes.render(scenes.draw(9, scenes.DISTINCT, i), 40).crop((0, 4, 40, 34))
        picture.save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text("<script>alert(1)</script>\nno 1" if i == 1 else f"caption {i}")
    return fine_tune(tmp_path_factory.mktemp("runs") / "folder", base, folder)
