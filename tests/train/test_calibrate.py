"""`memfilter calibrate`: what it finds, redone with the stock pipeline and numpy; what it writes; what it refuses."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import torch.distributed as dist
from accelerate import debug_launcher
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from memfilter.arguments import parse
from memfilter.calibration import Calibration
from memfilter.cli import main as command
from memfilter.data import sampler
from memfilter.data.shards import Shards
from memfilter.pipelines import load_pipeline, weights_digest
from memfilter.reference import SIGNALS
from memfilter.train.calibrate import calibrate

KEYS, LOOKS, SEED, BATCH, RESOLUTION = 7, 5, 3, 4, 16
FAMILIES = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """family -> pipeline; made when it is asked for"""
    made = {}

    def make(family: str):
        if family not in made:
            made[family] = tiny.save_pipeline(tmp_path_factory.mktemp("base") / family, family)
        return made[family]

    return make


@pytest.fixture(scope="module")
def settings(bases, scenes_dir):
    """Factory: command line of a calibration."""

    def make(out, family: str = "sd1", *more) -> list[str]:
        given = [
            "calibrate", f"--out={out}", f"--keys={KEYS}", f"--looks={LOOKS}", f"--model.path={bases(family)}",
            f"--data.path={scenes_dir}", f"--train.seed={SEED}", f"--train.batch_size={BATCH}",
        ]  # fmt: skip
        replaced = {setting.partition("=")[0] for setting in more}
        return [setting for setting in given if setting.partition("=")[0] not in replaced] + list(more)

    return make


@pytest.fixture(scope="module")
def calibrated(settings, tmp_path_factory):
    """Factory: calibrated(family) is the file of a calibration in this process."""
    made = {}

    def make(family: str):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("calibration") / "calibration.json"
            assert command(settings(made[family], family)) == 0
        return made[family]

    return make


@pytest.fixture
def refused(capfd):
    """What the command calls an error; a traceback fails the test."""

    def run(arguments) -> str:
        assert command(arguments) == 1
        (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
        return line.removeprefix("error: ")

    return run


def chosen_keys(scenes_dir) -> list[str]:
    """Of those that the index calls distinct, in an order that the seed gives."""
    index = pq.read_table(scenes_dir / "index.parquet").to_pydict()
    clean = [key for key, role in zip(index["key"], index["role"], strict=True) if role == "distinct"]
    return [clean[place] for place in np.random.default_rng(SEED).permutation(len(clean))[:KEYS]]


class ByHand:
    """Signals of one look at one key, from the stock pipeline's parts."""

    def __init__(self, base, scenes_dir):
        self.pipeline = DiffusionPipeline.from_pretrained(base, use_safetensors=True)
        self.scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.shards, self.keys = Shards.open(scenes_dir), chosen_keys(scenes_dir)

    @torch.no_grad()
    def __call__(self, key: int, look: int) -> tuple[int, dict[str, float]]:
        pipeline, position, name = self.pipeline, look * KEYS + key, self.keys[key]
        timestep = sampler.timestep(SEED, position, 1000)
        picture = self.shards.image(name).resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        posterior = pipeline.vae.encode(pixels).latent_dist
        shape = (4, 8, 8)
        draws = [draw(SEED, position, shape)[None] for draw in (sampler.posterior_noise, sampler.noise)]
        latents = (posterior.mean + posterior.std * draws[0]) * pipeline.vae.config.scaling_factor
        noisy_latents = self.scheduler.add_noise(latents, draws[1], torch.tensor([timestep]))
        encoded = pipeline.encode_prompt(
            self.shards.caption(name), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        cond, null = (self.predict(noisy_latents, timestep, encoded[first::2]) for first in (0, 1))

        x0, noise = (tensor[0].double().numpy() for tensor in (latents, draws[1]))
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        abar = np.cumprod(1 - betas)[timestep]
        target, factor = noise, 1.0
        if self.scheduler.config.prediction_type == "v_prediction":
            target, factor = np.sqrt(abar) * noise - np.sqrt(1 - abar) * x0, np.sqrt(abar)
        difference, loss = cond - null, ((cond - target) ** 2).mean()
        return timestep, {
            "norm": factor * np.sqrt((difference**2).sum()),
            "loss": loss,
            "cosine": (difference * null).sum() / np.sqrt((difference**2).sum() * (null**2).sum()),
            "gain": np.log(((null - target) ** 2).mean() / loss),
        }

    def predict(self, noisy_latents, timestep: int, prompt) -> np.ndarray:
        embeds, *pooled = prompt
        added = {}
        if pooled:  # the picture is square: of its size and crop the denoiser is told all the same
            time_ids = torch.tensor([[32.0, 32, 0, 0, RESOLUTION, RESOLUTION]])
            added = {"added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": time_ids}}
        return self.pipeline.unet(noisy_latents, timestep, embeds, **added).sample[0].double().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_signals_are_those_of_the_stock_pipeline(calibrated, bases, scenes_dir, family):
    calibration = Calibration.load(calibrated(family))
    assert calibration.timesteps.shape == (KEYS, LOOKS) and calibration.signals.shape == (KEYS, LOOKS, len(SIGNALS))
    assert calibration.signals.isfinite().all()
    by_hand = ByHand(bases(family), scenes_dir)
    for key, look in ((0, 0), (KEYS - 1, 0), (2, 3), (KEYS - 1, LOOKS - 1)):  # the last batch is not full
        timestep, signals = by_hand(key, look)
        assert calibration.timesteps[key, look] == timestep
        found = calibration.signals[key, look].numpy()
        np.testing.assert_allclose(found, [signals[name] for name in SIGNALS], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_says_what_it_was_made_with_and_serves_as_ground(calibrated, bases, family):
    calibration = Calibration.load(calibrated(family))
    expected = {"prediction_type": FAMILIES[family], "num_train_timesteps": 1000, "resolution": RESOLUTION}
    expected |= {"unit": "l2"}
    weights = weights_digest(load_pipeline(str(bases(family))).unet)
    assert calibration.about == expected | {"model": family, "weights": weights}
    calibration.require(**expected)
    positions = np.arange(KEYS * LOOKS).reshape(LOOKS, KEYS).T
    timesteps = [[sampler.timestep(SEED, position, 1000) for position in row] for row in positions.tolist()]
    assert calibration.timesteps.tolist() == timesteps  # each of them a fresh one
    norms, by_key = calibration.signals[..., SIGNALS.index("norm")], calibration.signals.flatten(1)
    assert (norms > 0).all() and len(by_key.unique(dim=0)) == KEYS
    assert calibration.reference(64).counts().sum() > 0


def test_norm_in_rms_is_that_in_l2_by_the_root_of_the_latents_size(settings, calibrated, tmp_path):
    assert command(settings(tmp_path / "rms.json", "sd1", "--filter.unit=rms")) == 0
    l2, rms = (Calibration.load(path) for path in (calibrated("sd1"), tmp_path / "rms.json"))
    assert rms.about["unit"] == "rms"
    np.testing.assert_allclose(rms.signals[..., 0] * 16, l2.signals[..., 0], rtol=1e-4)  # 4 x 8 x 8 numbers
    assert torch.equal(rms.signals[..., 1:], l2.signals[..., 1:])


def test_caption_dropout_and_method_of_the_run_do_not_matter(settings, calibrated, tmp_path):
    more = ("--data.caption_dropout=0.9", "--filter.method=evidence", "--train.learning_rate=1", "--filter.tau=null")
    assert command(settings(tmp_path / "out.json", "sd1", *more)) == 0
    assert (tmp_path / "out.json").read_bytes() == calibrated("sd1").read_bytes()


def test_same_settings_give_the_same_file_and_another_seed_does_not(settings, calibrated, tmp_path):
    assert command(settings(tmp_path / "again.json")) == 0
    assert (tmp_path / "again.json").read_bytes() == calibrated("sd1").read_bytes()
    assert command(settings(tmp_path / "new" / "other.json", "sd1", "--train.seed=4")) == 0
    others = Calibration.load(tmp_path / "new" / "other.json"), Calibration.load(calibrated("sd1"))
    assert not torch.equal(others[0].timesteps, others[1].timesteps)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["again.json", "new", "other.json"]


def _rank(config, out) -> None:
    calibrate(config, out, KEYS, LOOKS, progress=False)
    assert dist.get_world_size() == 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_both_passes_are_made_in_the_precision_of_the_run(settings, calibrated, tmp_path, precision):
    half, lora = (f"--train.mixed_precision={precision}",), ("--model.lora_rank=4",)  # whose weights are stored in halves
    for name, more in (("whole", half), ("lora", half + lora)):
        assert command(settings(tmp_path / name, "sd1", *more)) == 0
        found, expected = (Calibration.load(path).signals for path in (tmp_path / name, calibrated("sd1")))
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)
        assert not torch.equal(found, expected)


def test_two_processes_find_what_one_does(settings, calibrated, tmp_path):
    config = parse([s for s in settings(None) if s.startswith(("--model", "--data", "--train"))])
    debug_launcher(_rank, args=(config, tmp_path / "two.json"), num_processes=2)
    one, two = (Calibration.load(path) for path in (calibrated("sd1"), tmp_path / "two.json"))
    assert one.about == two.about and torch.equal(one.timesteps, two.timesteps)
    torch.testing.assert_close(two.signals, one.signals, rtol=1e-5, atol=1e-5)


# what is printed and refused


def test_table_for_people_has_the_quantiles_of_the_norm_by_timestep(settings, calibrated, tmp_path, capsys):
    assert command(settings(tmp_path / "out.json")) == 0
    *_, last = lines = capsys.readouterr().out.splitlines()
    assert last == str(tmp_path / "out.json")
    calibration = Calibration.load(calibrated("sd1"))
    norms, bins = calibration.signals[..., 0].flatten().numpy(), calibration.timesteps.flatten().numpy() // 100
    rows = [line.split() for line in lines if ".." in line and line.lstrip()[0].isdigit()]
    assert [row[0] for row in rows] == [f"{100 * b}..{100 * b + 99}" for b in np.unique(bins)]
    for row, b in zip(rows, np.unique(bins), strict=True):
        expected = [np.quantile(norms[bins == b], q) for q in (0.5, 0.9, 0.98)]
        np.testing.assert_allclose([float(cell) for cell in row[1:]], expected, rtol=2e-3)


def test_help_is_printed_and_ends_with_0(capsys):
    with pytest.raises(SystemExit) as stop:
        command(["calibrate", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for words in ("memfilter calibrate [--out", "--keys", "--looks", "--out", "--filter.calibration"):
        assert words in printed


def test_more_samples_than_are_clean_are_refused(settings, refused, tmp_path):
    error = refused(settings(tmp_path / "out.json", "sd1", "--keys=101"))
    assert error == "calibrate needs 101 clean samples, data.path has 100: ask for fewer keys"
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.streaming=webdataset"], "data.streaming: samples are looked at several times"),
        (["--keys=2"], "calibrate needs at least 6 keys and 1 look, found 2 and 5"),
        (["--looks=0"], "calibrate needs at least 6 keys and 1 look, found 7 and 0"),
        (["--keys=many"], "argument --keys: invalid int value: 'many'"),
        (["--key=7"], "key is no setting"),
        (["--data.path=nowhere"], "nothing to read: nowhere does not exist"),
        (["--model.path=nowhere"], "model.path: nowhere is not a pipeline directory"),
        (["--data.resolution=17"], "data.resolution: 17 is not a multiple of 2"),
        (["--train.batch_size=0"], "train.batch_size must be above 0"),
    ],
)
def test_what_cannot_be_calibrated_is_told_in_one_line(settings, refused, tmp_path, more, message):
    assert refused(settings(tmp_path / "out.json", "sd1", *more)).startswith(message)
    assert not (tmp_path / "out.json").exists()


@pytest.fixture
def folder(scenes_dir, tmp_path):
    """Factory: folder(name, contents) has KEYS samples; in the order in which they are drawn they show these of the scenes."""
    shards = Shards.open(scenes_dir)

    def make(name: str, contents: list[int | None]):
        data, drawn = tmp_path / name, np.random.default_rng(SEED).permutation(KEYS)
        data.mkdir()
        for place, content in zip(drawn, contents, strict=True):
            key = shards.keys()[content or 0]
            shards.image(key).save(data / f"{place}.png")
            (data / f"{place}.txt").write_text(shards.caption(key))
            if content is None:
                (data / f"{place}.png").write_bytes(b"no picture")
        return data

    return make


def test_in_the_place_of_samples_that_cannot_be_read_come_the_next(settings, folder, tmp_path, caplog):
    found = []
    for name, contents in {"broken": [0, None, 2, 3, 4, 5, 6], "whole": [0, 2, 3, 4, 5, 6, 1]}.items():
        out = tmp_path / f"{name}.json"
        assert command(settings(out, "sd1", "--keys=6", f"--data.path={folder(name, contents)}")) == 0
        found.append(Calibration.load(out))
    assert torch.equal(found[0].signals, found[1].signals)
    assert "left out, since they cannot be read: 1, the first of them: " in caplog.text


def test_fewer_samples_that_can_be_read_than_are_asked_for_are_refused(settings, refused, folder, tmp_path):
    data = folder("data", [0, None, 2, 3, 4, 5, 6])
    error = refused(settings(tmp_path / "out.json", "sd1", f"--data.path={data}"))
    assert error.startswith(f"calibrate needs {KEYS} clean samples that can be read, found {KEYS - 1} among 1 that cannot: ")
    assert not (tmp_path / "out.json").exists()


def test_model_whose_predictions_are_no_numbers_is_refused(settings, refused, tmp_path, bases):
    broken = shutil.copytree(bases("sd1"), tmp_path / "broken")
    weights = load_file(path := broken / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(weights | {"conv_out.bias": torch.full((4,), torch.nan)}, path)
    assert "finite" in refused(settings(tmp_path / "out.json", "sd1", f"--model.path={broken}"))
    assert not (tmp_path / "out.json").exists()


def test_place_that_cannot_be_written_is_told_in_one_line(settings, refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(settings(tmp_path / "file" / "out.json"))


def test_without_an_index_all_samples_are_taken_to_be_clean(settings, tmp_path, scenes_dir, caplog):
    shutil.copytree(scenes_dir, tmp_path / "data", ignore=shutil.ignore_patterns("index.parquet"))
    out = tmp_path / "out.json"
    assert command(settings(out, "sd1", f"--data.path={tmp_path / 'data'}", "--keys=104", "--looks=1")) == 0
    assert "taken to be clean" in caplog.text
    assert len(json.loads(out.read_text())["timesteps"]) == 104


def test_index_decides_who_is_clean(settings, tmp_path, scenes_dir):
    keys, index = Shards.open(scenes_dir).keys(), tmp_path / "index.parquet"
    roles = ["distinct"] * 6 + ["duplicate"] * (len(keys) - 6)
    pq.write_table(pa.table({"key": keys, "role": roles, "repeats": [5] * len(keys)}), index)
    out, more = tmp_path / "out.json", ("--keys=6", "--looks=1", f"--data.index={index}")
    assert command(settings(out, "sd1", *more)) == 0
    assert command(settings(out, "sd1", *more, "--keys=7")) == 1


def test_place_that_takes_no_file_is_told_before_anything_is_looked_at(settings, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("memfilter.train.calibrate.load_model", lambda config: pytest.fail("a model was loaded"))
    assert "cannot be written: it is a directory" in refused(settings(tmp_path))
