"""The command ``memfilter``. Every function is a subcommand; what it needs is imported when it runs."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from pathlib import Path
from typing import Literal

from memfilter.data.duplicates import NEAR_BITS
from memfilter.data.plan import Plan
from memfilter.text import printable


def scenes(
    out: str,
    seed: int = 0,
    duplicates: int = 20,
    repeats: int = 500,
    distinct: int = 6000,
    distinct_repeats: int = 1,
    near_copies: int = 1,
) -> None:
    """Write clipart scenes as webdataset shards with an index of roles and repeats.

    Args:
        out: directory to make.
        seed: another seed gives other scenes.
        duplicates: scenes that are shown many times.
        repeats: how often each of them is shown.
        distinct: other scenes.
        distinct_repeats: how often each of them is shown.
        near_copies: above 1, a duplicate comes under so many keys with slightly different captions and crops, which share
            its repeats.
    """
    from memfilter.data.experiment import prepare_scenes

    print(prepare_scenes(Path(out), seed, duplicates, repeats, distinct, distinct_repeats, near_copies))


def experiment(data: str, out: str, hashes: str | None = None, processes: int | None = None, **conditions) -> None:
    """Choose pictures to be shown often and others to be shown once, none a copy of another, and write a manifest.

    Args:
        data: directory of img2dataset's shards or of pictures with .txt files, or of directories of them.
        out: directory for manifest.parquet, lost.jsonl (what is of no use, and why) and hashes/, from which an
            interrupted search goes on.
        hashes: another directory for the hashes, to be shared by several experiments.
        processes: that read and hash; by default one for each core.
        **conditions: see `Plan`.
    """
    plan = Plan(**conditions)
    from memfilter.data.builder import prepare_experiment
    from memfilter.data.manifest import MANIFEST

    prepare_experiment(Path(data), Path(out), plan, processes, Path(hashes) if hashes else None)
    print(Path(out, MANIFEST))


def groups(data: str, index: str | None = None, max_bits: int = NEAR_BITS, processes: int | None = None) -> None:
    """Find near duplicates and name their groups in the index, for filter.key=content.

    Args:
        data: directory of shards or of pictures with .txt files.
        index: Parquet file that gets the column group; by default index.parquet beside the data, made where it is not.
        max_bits: of 64, by which the perceptual hashes of near duplicates differ.
        processes: that read and hash; by default one for each core.
    """
    from memfilter.data.groups import prepare_groups

    print(f"{prepare_groups(Path(data), Path(index) if index else None, max_bits, processes):,} groups of near duplicates")


def verify(manifest: str, data: str | None = None) -> None:
    """Read every picture of a manifest again; exit code 1 and a line for each that is not as it was.

    Args:
        manifest: Parquet file.
        data: directory of the shards; by default the manifest's.
    """
    from memfilter.data.manifest import require_unchanged

    samples = require_unchanged(Path(manifest), Path(data) if data else Path(manifest).parent)
    print(f"{samples:,} samples are as they were")


def cache(*settings: str) -> None:
    """Encode every picture and caption once, for training to read; see `memfilter cache --help`."""
    from memfilter.data.make_cache import main as make

    out = make(list(settings))
    if os.environ.get("RANK", "0") == "0":
        print(out)


def calibrate(*settings: str) -> None:
    """Look at clean samples with the model as it is, for filter.method=evidence; see `memfilter calibrate --help`."""
    from memfilter.train.calibrate import main as make

    out = make(list(settings))
    if os.environ.get("RANK", "0") == "0":
        print(out)


def evaluate(
    run: str,
    distinct: int = 20,
    seeds: int = 4,
    steps: int = 20,
    guidance_scale: float = 4.0,
    near_copies: int = 1,
    prompts: str | None = None,
    measure: Literal["pixels", "wen", "dcr", "official", "official-288", "sscd-onnx"] = "pixels",
    sscd: str | None = None,
    sscd_sha256: str | None = None,
    nearest: bool = False,
    clip: str | None = None,
    frechet: Literal["scorer", "clip", "measure"] | None = None,
    batch_size: int = 16,
) -> None:
    """Generate for a run's duplicate and distinct prompts and measure what is copied.

    Several processes share the work: accelerate launch -m memfilter.cli evaluate ... What was interrupted goes on when
    it is run again. docs/evaluation.md says what is measured and how.

    Args:
        run: directory of a finished run.
        distinct: prompts of distinct samples beside all the duplicates.
        seeds: pictures for each prompt.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        near_copies: as the scenes were prepared with; a copy of any of them counts.
        prompts: file of prompts instead of the run's own; .jsonl, .csv or .parquet with "prompt" and perhaps "key" (of a
            training sample), or one a line.
        measure: of copy similarity; pixels (correlation), a preset of SSCD (wen, dcr, official or official-288), or
            sscd-onnx.
        sscd: TorchScript file of SSCD, for a preset. It is a program: use none that you do not trust.
        sscd_sha256: of that file; without it, it must be the preset's own.
        nearest: look for the nearest of all training pictures too; dcr always does.
        clip: directory or hub id of a CLIP, for the CLIP score.
        frechet: features for the Frechet distance and KID; scorer (clipart scenes), clip or measure (of pixels up
            to 36 px).
        batch_size: pictures at a time.
    """
    from memfilter.eval.evaluate import evaluate_run
    from memfilter.eval.sscd import measure_named
    from memfilter.processes import end_processes, processes

    figures = evaluate_run(
        Path(run),
        distinct=distinct,
        seeds=seeds,
        steps=steps,
        guidance_scale=guidance_scale,
        near_copies=near_copies,
        prompts=Path(prompts) if prompts else None,
        measure=measure_named(measure, Path(sscd) if sscd else None, sscd_sha256, processes().device),
        nearest=nearest or measure == "dcr",
        clip=clip,
        frechet=frechet,
        batch_size=batch_size,
    )
    if processes().is_main_process:
        for kind in ("duplicates", "distinct", "unknown"):
            if figures[kind]:
                print(f"{kind}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures[kind].items()))
        if frechet:
            numbers = {name: value for name, value in figures["frechet"].items() if name != "features"}
            print("frechet: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    end_processes()


def require_evaluation(words: list[str]) -> None:
    """Raises ValueError where `evaluate` would refuse these words whatever the run."""
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    from memfilter.eval.evaluate import require_sensible
    from memfilter.eval.sscd import measure_named

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(evaluate, as_positional=True)
    try:
        asked = parser.parse_args(["run", *words])
    except ArgumentError as error:
        raise ValueError(f"--evaluate: {' '.join(str(error).split())}") from error
    names = ("distinct", "seeds", "steps", "near_copies", "batch_size", "clip", "frechet")
    require_sensible(**{name: asked[name] for name in names})
    measure_named(asked.measure, Path(asked.sscd) if asked.sscd else None, asked.sscd_sha256)


def sweep(file: str, out: str | None = None, evaluate: str = "", processes: int = 1) -> None:
    """Make and evaluate the runs of a W&B sweep file here, without a server, and write their table.

    Runs that are there already, or that the table has, are not made again, so a sweep that was stopped goes on, also where
    directories of finished runs were removed. A run that fails fails the sweep, after all others were made.

    Args:
        file: a sweep as `wandb sweep` takes it, of method grid.
        out: directory for results.csv, results.parquet and logs/; by default runs/sweeps/ and the file's name.
        evaluate: settings of `memfilter evaluate`, such as "--distinct=40 --seeds=4".
        processes: so many runs at a time.
    """
    import shlex

    from memfilter.sweep import Sweep, read_sweep

    if processes < 1:
        raise ValueError(f"processes must be at least 1, found {processes}")
    require_evaluation(shlex.split(evaluate))
    points = read_sweep(Path(file))
    place = Path(out) if out else Path("runs", "sweeps", Path(file).stem)
    Sweep(points, place, shlex.split(evaluate), processes).run()
    print(place / "results.csv")


def report(sweep: str, out: str | None = None) -> None:
    """Write one HTML page about a sweep, or, as `memfilter report OFF ON OUT`, one that holds two runs against each other.

    Args:
        sweep: directory of the sweep; figures/*.png and tables/*.csv are written there too. Or three words: the directory of
            a run without the filter (filter.tau=inf measures the norms all the same), that of a run with it, the page.
        out: the page; by default report.html in the sweep's directory.
    """
    from memfilter.eval.sweep_report import write_sweep_report

    print(write_sweep_report(Path(sweep), None if out is None else Path(out)))


def report_pair(off: str, on: str, out: str) -> None:
    """Write one HTML page that holds a run with the filter against one without.

    Args:
        off: directory of the run without the filter (filter.tau=inf measures the norms all the same).
        on: directory of the run with it.
        out: the page.
    """
    from memfilter.eval.report import write_report

    write_report(Path(off), Path(on), Path(out))
    print(out)


# packages that only some commands need, and what installs them
EXTRAS = {
    **dict.fromkeys(("faiss", "jsonargparse", "numpy", "PIL", "pyarrow", "tqdm", "webdataset", "yaml"), "data"),
    **dict.fromkeys(("accelerate", "diffusers", "jinja2", "peft", "psutil", "safetensors", "transformers", "wandb"), "train"),
    **dict.fromkeys(("matplotlib", "pandas", "plotly", "scipy", "sklearn", "torchmetrics"), "eval"),
    "gradio": "app",
}


def quiet_libraries() -> None:
    """diffusers and transformers greet every start with warnings about packages that are not needed here, and so do
    bitsandbytes and DeepSpeed, which they import. Call this before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def report_error(error: Exception) -> int:
    """Prints each line of the message as an error, and whose it is where several processes run; returns the exit code."""
    rank = os.environ.get("RANK", "0")
    for line in str(error).splitlines():
        print(f"error: {'' if rank == '0' else f'rank {rank}: '}{printable(line)}", file=sys.stderr)
    return 1


def report_missing(error: ModuleNotFoundError, extra: str | None) -> int:
    """As `report_error`, with what installs the package; raises the error where no extra does."""
    if extra is None:
        raise error
    return report_error(ValueError(f"this needs the package {error.name}: pip install '.[{extra}]'"))


def main(argv: list[str] | None = None) -> int:
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        return report_error(error)
    except ModuleNotFoundError as error:
        return report_missing(error, EXTRAS.get((error.name or "").partition(".")[0]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # as shells have it


def _main(argv: list[str]) -> int:
    from jsonargparse import ArgumentParser, auto_cli

    class Parser(ArgumentParser):
        """Whose help has all that a command says of itself, not its first line alone."""

        def add_function_arguments(self, function, *args, **kwargs):
            self.description = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
            return super().add_function_arguments(function, *args, **kwargs)

    from memfilter.data.laion import commands as laion
    from memfilter.inference import commands as inference

    quiet_libraries()
    commands = {
        "prepare": {
            "_help": "make data to train on",
            "laion": {
                "_help": "choose from LAION-style metadata, and download",
                "select": laion.select,
                "download": laion.download,
            },
            "scenes": scenes,
            "experiment": experiment,
            "groups": groups,
            "verify": verify,
        },
        "cache": cache,
        "calibrate": calibrate,
        "evaluate": evaluate,
        "sweep": sweep,
        "report": report,
        "detect": inference.detect,
        "explain": inference.explain,
        "generate": inference.generate,
        "app": inference.app,
    }
    if argv[:1] == ["report"] and len(argv) == 4 and not any(word.startswith("-") for word in argv):
        commands["report"] = report_pair
    if argv[:1] in (["cache"], ["calibrate"]):  # they take the settings of a training run
        commands[argv[0]](*argv[1:])
        return 0
    about = "YAML file with any of the arguments below"
    auto_cli(commands, args=argv, prog="memfilter", as_positional=True, parser_class=Parser, config_help=about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
