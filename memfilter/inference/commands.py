"""``memfilter detect``, ``explain``, ``generate`` and ``app``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Literal

SUFFIXES = (".parquet", ".jsonl")


def detect(
    model: str,
    prompts: str | None = None,
    out: str = "detections.parquet",
    clean: str | None = None,
    false_positive_rate: float = 0.01,
    first: int = 10,
    seeds: int = 4,
    steps: int = 50,
    guidance_scale: float = 7.5,
    size: int | None = None,
    rivals: list[str] | None = None,
    quick: bool = False,
    batch_size: int = 16,
) -> None:
    """Tell which prompts a model has memorized, by how strongly it answers them.

    Writes a row for each prompt: the paper's metric after the first step, the first steps and all, a p-value, and whether it is
    memorized. Several processes share the work: accelerate launch -m memfilter.cli detect ... What was interrupted goes on when
    it is run again.

    Args:
        model: directory of a run, of a diffusers pipeline, a hub id, or "scenes".
        prompts: file; one prompt a line, or .jsonl, .csv, .parquet with "prompt". By default those of the run: its duplicates
            and 40 others.
        out: .parquet or .jsonl.
        clean: file of prompts that are certainly not memorized, or .json of their norms that an earlier call has left
            (beside its out). By default, for models of clipart scenes, captions of new scenes.
        false_positive_rate: share of clean prompts that may be called memorized.
        first: steps that the verdict goes by; 0 for all.
        seeds: generations of each prompt.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance, above 1.
        size: height and width in pixels; by default the run's, or what the model was made for.
        rivals: other methods on the same generations; density_l2, density_copies, anisotropy, loss.
        quick: break every generation off after the first steps; leaves the metric of all steps and the rivals out.
        batch_size: pictures at a time.
    """
    from memfilter.data.shards import printable
    from memfilter.eval.parts import Parts, processes
    from memfilter.inference.detection import Sampling, judge, measure_prompts
    from memfilter.inference.models import Model
    from memfilter.train.engine import end_processes

    place, counted = Path(out), first or None
    if place.suffix not in SUFFIXES:
        raise ValueError(f"out: {out} must end in one of {', '.join(SUFFIXES)}")
    if quick and not counted:
        raise ValueError("quick needs first above 0: after so many steps a generation is broken off")
    if counted and counted > steps:
        raise ValueError(f"first is {first}, more than steps, which is {steps}")
    if quick and rivals:
        raise ValueError("rivals need whole generations: leave quick out")
    chosen, state = Model(model), processes()
    asked = _asked(chosen, prompts)
    sampling = Sampling(seeds, steps, guidance_scale, size or chosen.size)
    place.parent.mkdir(parents=True, exist_ok=True)
    work = place.with_name(f".{place.name}.parts")
    facts = sampling.facts(chosen.pipeline) | {"seeds": seeds, "model": chosen.stamp(), "batch_size": batch_size}
    more = {"batch_size": batch_size, "until": counted if quick else None}
    clean_file = Path(clean) if clean else None
    clean_facts = facts | more | {"clean": [str(clean), chosen.name]}
    clean_prompts = None if clean_file and clean_file.suffix == ".json" else chosen.clean_prompts(clean_file)
    ground = chosen.clean_norms(
        clean_file, sampling, place.with_suffix(".clean.json"),
        Parts(work, "clean", clean_facts | {"prompts": clean_prompts}, state), **more,
    )  # fmt: skip
    ground.threshold(false_positive_rate, counted, seeds)  # what cannot be judged is refused before the work begins
    texts = [row["prompt"] for row in asked]
    parts = Parts(work, "detect", facts | more | {"prompts": texts, "rivals": rivals}, state)
    signals = measure_prompts(chosen.pipeline, texts, sampling, rivals=rivals or (), parts=parts, **more)
    threshold, p_values = judge(signals, ground, false_positive_rate, counted)
    if state.is_main_process:
        rows = _rows(asked, signals, counted, quick, threshold, p_values)
        _write_rows(rows, place)
        shutil.rmtree(work, ignore_errors=True)
        memorized = sorted((row for row in rows if row["memorized"]), key=lambda row: row["p_value"])
        for row in memorized[:20]:
            print(f"p {row['p_value']:.3g}  {printable(row['prompt'])[:100]}")
        if len(memorized) > 20:
            print(f"... and {len(memorized) - 20} more")
        print(f"{len(memorized):,} of {len(rows):,} prompts are memorized: a metric of at least {threshold:.4g}, which "
              f"{false_positive_rate:.3g} of clean prompts may reach. {place}")  # fmt: skip
    end_processes()


def _asked(model, prompts: str | None, others: int = 40) -> list[dict]:
    """Prompts with what is known of them."""
    from memfilter.data.prompts import read_prompts

    if prompts is not None:
        return [row for _, row in read_prompts(Path(prompts))]
    if model.run is None:
        raise ValueError(f"prompts: name a file, {model.name} is no run that has its own")
    return [{"prompt": p.text, "key": p.key, "duplicate": p.duplicate} for p in model.run.prompts(others)]


def _rows(asked, signals, first, quick, threshold, p_values) -> list[dict]:
    metric = signals.metric(first)
    columns = {"metric_first_step": signals.metric(1)}
    if first:
        columns[f"metric_first_{first}"] = metric
    if not quick:
        columns["metric_all"] = signals.metric()
    columns |= {"p_value": p_values} | {name: signals.rival(name) for name in signals.raw}
    norms = signals.norms.mean(1)  # [P, seeds, S] -> [P, S]
    rows = []
    for number, known in enumerate(asked):
        row = {**known, **{name: float(values[number]) for name, values in columns.items()}}
        rows.append(row | {"memorized": bool(metric[number] >= threshold), "norms": [float(v) for v in norms[number]]})
    return rows


def _write_rows(rows: list[dict], out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from memfilter.files import atomic

    with atomic(out) as partial:
        if out.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), partial)
        else:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def explain(
    model: str,
    prompt: str,
    out: str | None = None,
    seeds: int = 4,
    steps: int = 50,
    at: list[int] | None = None,
    guidance_scale: float = 7.5,
    size: int | None = None,
    colour: Literal["auto", "always", "never"] = "auto",
) -> None:
    """Show which words of a prompt its strong answer hangs on.

    The significance score is the gradient of the norm with respect to a token's embedding, its length, mean over seeds and
    steps (Wen et al., section 4.1); a word has the largest of its tokens'. Prints the prompt with its words coloured by score,
    and a bar for each.

    Args:
        model: directory of a run, of a diffusers pipeline, a hub id, or "scenes".
        prompt: to be explained.
        out: .json for words, tokens and scores, or .png for the bars.
        seeds: generations that the mean is over.
        steps: of the sampler.
        at: steps of it, counted from 0, at which gradients are taken; by default the first. The paper takes all.
        guidance_scale: of classifier-free guidance, above 1.
        size: height and width in pixels; by default the run's, or what the model was made for.
        colour: of the line; auto where the output is a terminal.
    """
    from memfilter.inference.detection import Sampling
    from memfilter.inference.models import Model
    from memfilter.inference.showing import bars, coloured, write_words
    from memfilter.inference.significance import token_significance

    if out is not None and Path(out).suffix not in (".json", ".png"):
        raise ValueError(f"out: {out} must end in .json or .png")
    chosen = Model(model)
    sampling = Sampling(seeds, steps, guidance_scale, size or chosen.size)
    words = token_significance(chosen.pipeline, prompt, sampling, tuple(at or (0,)))
    if not words:
        raise ValueError("prompt: it has no words")
    print(coloured(words, colour == "always" or (colour == "auto" and sys.stdout.isatty())))
    print(bars(words))
    if out is not None:
        write_words(words, prompt, Path(out))
        print(out)


def generate(
    model: str,
    out: str,
    prompt: str | None = None,
    prompts: str | None = None,
    seeds: int = 4,
    mitigation: Literal["none", "prompt", "rta"] = "none",
    when: Literal["detected", "always"] = "detected",
    target: float | None = None,
    tokens: int = 4,
    clean: str | None = None,
    false_positive_rate: float = 0.01,
    steps: int = 50,
    guidance_scale: float = 7.5,
    size: int | None = None,
) -> None:
    """Generate pictures that are no copies.

    Writes a PNG for each prompt and seed, and pictures.jsonl, which says what was done and what the norms were.

    Args:
        model: directory of a run, of a diffusers pipeline, a hub id, or "scenes".
        out: directory.
        prompt: one prompt.
        prompts: file of prompts instead; as `memfilter detect` takes it.
        seeds: pictures of each prompt.
        mitigation: none; prompt moves its embedding until the first step's norm of each picture is at most target (Wen et al.,
            section 4.2); rta adds random tokens (Somepalli et al.).
        when: whether only for prompts that are detected as memorized by their first step, or always.
        target: norm to come down to, for prompt; by default the median of clean prompts.
        tokens: so many, for rta.
        clean: prompts that are certainly not memorized or their norms, as `memfilter detect` takes and leaves them; asked for
            detection, and for a target that is not given. By default, for models of clipart scenes, captions of new scenes.
        false_positive_rate: of the detection.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance, above 1.
        size: height and width in pixels; by default the run's, or what the model was made for.
    """
    from memfilter.inference.detection import Sampling
    from memfilter.inference.generating import Mitigation, write_pictures
    from memfilter.inference.models import Model

    if (prompt is None) == (prompts is None):
        raise ValueError("prompt, prompts: name one of them")
    chosen, place = Model(model), Path(out)
    texts = [prompt] if prompts is None else [row["prompt"] for row in _asked(chosen, prompts)]
    sampling = Sampling(seeds, steps, guidance_scale, size or chosen.size)
    threshold = None
    if mitigation != "none" and (when == "detected" or (mitigation == "prompt" and target is None)):
        ground = chosen.clean_norms(Path(clean) if clean else None, sampling, place / "clean.json", until=1)
        threshold = ground.threshold(false_positive_rate, 1, seeds) if when == "detected" else None
        target = float(ground.band((0.5,))[0, 0]) if target is None else target
    how = Mitigation(mitigation, threshold, target, tokens)
    changed = write_pictures(chosen.pipeline, texts, sampling, how, place)
    print(f"{len(texts) * seeds:,} pictures, prompts changed for {changed:,} of {len(texts):,}. {place}")


def app(
    model: str,
    clean: str | None = None,
    false_positive_rate: float = 0.01,
    seeds: int = 4,
    steps: int = 20,
    guidance_scale: float = 7.5,
    size: int | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Open a page to try prompts on: pictures, whether the prompt is memorized, by which words, and what helps.

    Norms of clean prompts are measured first, which takes a while, and kept in the run's directory, or beside the file of
    prompts, for the next time.

    Args:
        model: directory of a run, of a diffusers pipeline, a hub id, or "scenes", the model that comes with the package.
        clean: file of prompts that are certainly not memorized, or .json of their norms. By default, for models of clipart
            scenes, captions of new scenes.
        false_positive_rate: share of clean prompts that may be called memorized.
        seeds: pictures of each prompt.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance, above 1.
        size: height and width in pixels; by default the run's, or what the model was made for.
        host: address to listen at; 0.0.0.0 lets other machines in.
        port: to listen at; 0 for any that is free.
    """
    from memfilter.inference.app import serve
    from memfilter.inference.detection import Sampling
    from memfilter.inference.models import Model

    chosen = Model(model)
    sampling = Sampling(seeds, steps, guidance_scale, size or chosen.size)
    ground = chosen.kept_norms(Path(clean) if clean else None, sampling)
    serve(chosen, ground, sampling, false_positive_rate, host, port)
