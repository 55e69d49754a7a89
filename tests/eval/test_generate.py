import numpy as np
import tiny
import torch

from memfilter.eval.generate import generate
from memfilter.pipelines import load_pipeline


class Blackening(torch.nn.Module):
    def forward(self, images, clip_input):
        return images * 0, [True] * len(images)


def test_safety_checker_does_not_blacken_what_is_measured(tmp_path):
    pipeline = load_pipeline(str(tiny.save_pipeline(tmp_path, "sd1")))
    expected = generate(pipeline, ["a cat"], steps=2, size=16, progress=False)
    pipeline.safety_checker = Blackening()
    found = generate(pipeline, ["a cat"], steps=2, size=16, progress=False)
    np.testing.assert_array_equal(found, expected)
    assert found.std() > 1
    assert pipeline.safety_checker is not None
