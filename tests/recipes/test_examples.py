"""The scripts under examples/ are run as a user would run them."""

import difflib
import json
import subprocess
import sys
from pathlib import Path

from diffusers import StableDiffusionPipeline

from memfilter.data import scenes
from memfilter.pipelines import model_dir

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_filter_changes_at_most_five_lines_of_a_plain_script():
    def code(name):
        source = (EXAMPLES / name).read_text().split('"""', 2)[2]
        return [line for line in source.splitlines() if line.strip()]

    plain, filtered = code("plain_loop.py"), code("plain_loop_filtered.py")
    added = [line for line in difflib.ndiff(plain, filtered) if line.startswith("+ ")]
    assert len(plain) <= 60
    assert 0 < len(added) <= 5


def test_filtered_script_trains_and_saves_a_pipeline_that_loads(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(24):
        scene = scenes.draw(1, 1, i)
        scenes.render(scene).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(scene.caption)
    subprocess.run(
        [sys.executable, EXAMPLES / "plain_loop_filtered.py", model_dir("scenes"), data, tmp_path / "out"],
        check=True,
    )
    trained = StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet.state_dict()
    base = StableDiffusionPipeline.from_pretrained(model_dir("scenes")).unet.state_dict()
    assert trained.keys() == base.keys()
    assert any((trained[name] != base[name].float()).any() for name in base)
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["unet"][1] == "UNet2DConditionModel"
