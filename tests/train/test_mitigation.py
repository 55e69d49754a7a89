"""What others do against memorization, as a run does it."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from memfilter.arguments import parse
from memfilter.cli import main as command
from memfilter.config import ConfigError
from memfilter.data.sampler import collate
from memfilter.train.loop import Trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "sd1", "sd1")


@pytest.fixture
def trainer(base, scenes_dir, tmp_path):
    """Factory: a run that is ready to begin."""

    def make(*more) -> Trainer:
        settings = [f"--run_dir={tmp_path / 'run'}", f"--model.path={base}", "--train.samples=16", "--train.batch_size=8",
                    "--filter.tau=null"]  # fmt: skip
        given = {setting.partition("=")[0] for setting in more}
        data = [] if "--data.path" in given else [f"--data.path={scenes_dir}"]
        return Trainer(parse([*settings, *data, *more]))

    return make


def inputs_of(trainer: Trainer):
    return trainer.objective.inputs(collate([trainer.dataset[position] for position in range(8)]))


def test_captions_are_changed_and_what_is_drawn_besides_stays(trainer):
    plain, changed = (inputs_of(trainer(f"--mitigation.random_tokens={n}")) for n in (0, 2))
    for before, after in zip(plain.captions, changed.captions, strict=True):
        assert len(after.split(" ")) == len(before.split(" ")) + 2
    assert torch.equal(plain.noisy_latents, changed.noisy_latents) and torch.equal(plain.timesteps, changed.timesteps)
    embeddings = [inputs.conditions["encoder_hidden_states"] for inputs in (plain, changed)]
    assert all(not torch.equal(*rows) for rows in zip(*embeddings, strict=True))
    again = inputs_of(trainer("--mitigation.random_tokens=2"))
    assert again.captions == changed.captions


def test_embeddings_get_normal_noise_but_the_empty_prompt_does_not(trainer):
    dropout = "--data.caption_dropout=0.5"
    plain, noisy = (inputs_of(trainer(dropout, f"--mitigation.embedding_noise={std}")) for std in (0.0, 0.3))
    assert plain.captions == noisy.captions and 0 < sum(not c for c in plain.captions) < 8
    shift = noisy.conditions["encoder_hidden_states"] - plain.conditions["encoder_hidden_states"]
    dropped = torch.tensor([not caption for caption in plain.captions])
    assert not shift[dropped].any()
    drawn = shift[~dropped] / 0.3
    assert drawn.mean().abs() < 0.1 and drawn.std() == pytest.approx(1, abs=0.1)
    assert len(drawn.flatten().unique()) > 0.9 * drawn.numel()


def test_one_of_each_group_is_shown_once(trainer, scenes_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scenes_dir, data)
    table = pq.read_table(data / "index.parquet")
    groups = [f"g{i // 3}" for i in range(len(table))]
    pq.write_table(table.append_column("group", pa.array(groups)), data / "index.parquet")
    made = trainer(f"--data.path={data}", "--mitigation.deduplicate=true")
    keys = table["key"].to_pylist()
    assert made.dataset.experiment.keys == keys[::3] and (made.dataset.experiment.repeats == 1).all()
    shown = [made.dataset[position]["key"] for position in range(2 * len(keys[::3]))]
    half = len(shown) // 2
    assert sorted(shown[:half]) == sorted(shown[half:]) == keys[::3]
    duplicate = np.array(table["role"].to_pylist()) == "duplicate"
    np.testing.assert_array_equal(made.dataset.experiment.duplicate, duplicate[::3])
    left_out = 1 - (~duplicate[::3]).sum() / (~duplicate).sum()
    assert made.left_out == {"data/distinct_left_out": pytest.approx(left_out)} and 0.6 < left_out < 0.7


def test_cache_serves_with_de_duplication_and_without(trainer, scenes_dir, tmp_path):
    data, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(scenes_dir, data)
    table = pq.read_table(data / "index.parquet")
    pq.write_table(table.append_column("group", pa.array([f"g{i // 3}" for i in range(len(table))])), data / "index.parquet")
    assert command(["cache", "--model.path=scenes", f"--data.path={data}", f"--data.cache={cache}"]) == 0
    settings = ("--model.path=scenes", f"--data.path={data}", f"--data.cache={cache}")
    for more in ([], ["--mitigation.deduplicate=true"]):
        made = trainer(*settings, *more)
        assert made.dataset[0]["key"] in made.dataset.experiment.keys
    assert command(["cache", *settings, "--mitigation.deduplicate=true"]) == 0  # which finds it whole
    assert len(made.dataset.experiment.keys) * 3 >= len(table) == len(made.dataset.experiment.whole.keys)


def test_without_groups_nothing_can_be_deduplicated(trainer):
    with pytest.raises(ConfigError, match="mitigation.deduplicate needs a column group"):
        trainer("--mitigation.deduplicate=true")
