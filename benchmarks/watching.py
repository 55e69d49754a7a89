"""What watching costs: generations with and without, in turn, on the embedded model.

    python benchmarks/watching.py

For DDIM, DPM-Solver++ and Euler: four pictures, 20 steps, in pairs whose order changes, and the median of their ratios with a
95% interval (bootstrap over pairs). The pictures are compared bit by bit. The model is tiny: what watching adds to a step is
the same for a large one, beside whose steps it is nothing. The table goes to docs/results/watching.md; exit code 1 if a picture
differs or a median is above 1.02.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCHEDULERS = {"DDIM": "DDIMScheduler", "DPM-Solver++": "DPMSolverMultistepScheduler", "Euler": "EulerDiscreteScheduler"}
LIMIT = 1.02
PROMPT = "a cat on a red background"


def pairs(pipeline, count: int) -> tuple[np.ndarray, bool]:
    """Ratios of watched to plain, [count], and whether all pictures are the same."""
    import torch

    from memfilter.inference import watch

    def generate(watched: bool) -> tuple[float, np.ndarray]:
        form = {"num_inference_steps": 20, "guidance_scale": 4.0, "num_images_per_prompt": 4, "output_type": "np"}
        generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
        began = time.process_time()  # other processes share the machine
        if watched:
            with watch(pipeline) as seen:
                images = pipeline(PROMPT, generator=generator, **form).images
                assert seen.norms.shape == (4, 20)
        else:
            images = pipeline(PROMPT, generator=generator, **form).images
        return time.process_time() - began, images

    ratios, plain = [], generate(False)[1]
    same = True
    for number in range(count):
        found = {watched: generate(watched) for watched in ((False, True) if number % 2 else (True, False))}
        ratios.append(found[True][0] / found[False][0])
        same &= all(np.array_equal(images, plain) for _, images in found.values())
    return np.array(ratios), same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="directory of the table")
    args = parser.parse_args()
    import diffusers
    import torch

    from memfilter.pipelines import load_pipeline

    torch.set_num_threads(1)
    pipeline, rng = load_pipeline("scenes"), np.random.default_rng(0)
    lines = ["| sampler | watched / plain, median of pairs | 95% interval | pictures |", "|---" * 4 + "|"]
    good = True
    for name, kind in SCHEDULERS.items():
        pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config)
        ratios, same = pairs(pipeline, args.pairs)
        median = float(np.median(ratios))
        low, high = np.quantile(np.median(rng.choice(ratios, (2000, len(ratios))), axis=1), [0.025, 0.975])
        good &= same and median <= LIMIT
        lines.append(f"| {name} | {median:.4f} | {low:.4f} to {high:.4f} | {'the same' if same else 'DIFFER'} |")
        print(lines[-1], flush=True)
    text = "\n".join([f"{args.pairs} pairs, CPU time of one core: `python benchmarks/watching.py`.", "", *lines])
    (args.out / "watching.md").write_text(text + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
