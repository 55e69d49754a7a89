"""What watching costs: generations with and without, in turn, on the embedded model.

    python benchmarks/watching.py

For DDIM, DPM-Solver++ and Euler: generations of 10 steps in blocks of four, plain and watched in turn and then the other way
round, and the median of the blocks' ratios with a 95% interval (bootstrap over blocks). The pictures are compared bit by bit. The
model is tiny: what watching adds to a step is the same for a large one, beside whose steps it is nothing. The table goes to
docs/results/watching.md; exit code 1 if a picture differs or the interval reaches above 1.02.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from common import parser, write_text

SCHEDULERS = {"DDIM": "DDIMScheduler", "DPM-Solver++": "DPMSolverMultistepScheduler", "Euler": "EulerDiscreteScheduler"}
LIMIT = 1.02
STEPS = 10
PROMPT = "a cat on a red background"


def blocks(pipeline, count: int) -> tuple[np.ndarray, bool]:
    """Ratios of watched to plain, [count], and whether all pictures are the same."""
    import torch

    from memfilter.inference import watch

    form = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "np"}

    def generate(watched: bool) -> tuple[float, np.ndarray]:
        generator = torch.Generator().manual_seed(0)
        began = time.process_time()  # other processes share the machine
        if watched:
            with watch(pipeline) as seen:
                images = pipeline(PROMPT, generator=generator, **form).images
                assert seen.norms.shape == (1, STEPS)
        else:
            images = pipeline(PROMPT, generator=generator, **form).images
        return time.process_time() - began, images

    ratios, plain = [], generate(False)[1]
    same = True
    for _ in range(count):
        seconds = {False: 0.0, True: 0.0}
        for watched in (False, True, True, False):  # what drifts falls on both alike
            took, images = generate(watched)
            seconds[watched] += took
            same &= np.array_equal(images, plain)
        ratios.append(seconds[True] / seconds[False])
    return np.array(ratios), same


def main() -> int:
    options = parser(__doc__, processes=False)
    options.add_argument("--blocks", type=int, default=150)
    args = options.parse_args()
    import diffusers
    import torch

    from memfilter.pipelines import load_pipeline

    torch.set_num_threads(1)
    pipeline, rng = load_pipeline("scenes"), np.random.default_rng(0)
    lines = ["| sampler | watched / plain, median of blocks | 95% interval | pictures |", "|---" * 4 + "|"]
    good = True
    for name, kind in SCHEDULERS.items():
        pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config)
        ratios, same = blocks(pipeline, args.blocks)
        median = float(np.median(ratios))
        low, high = np.quantile(np.median(rng.choice(ratios, (2000, len(ratios))), axis=1), [0.025, 0.975])
        good &= same and bool(high <= LIMIT)
        lines.append(f"| {name} | {median:.4f} | {low:.4f} to {high:.4f} | {'the same' if same else 'DIFFER'} |")
        print(lines[-1], flush=True)
    text = "\n".join([f"{args.blocks} blocks, CPU time of one core: `python benchmarks/watching.py`.", "", *lines])
    write_text(args.out / "watching.md", text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
