"""``memfilter detect``, ``explain``, ``generate`` and ``app``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal


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
    measure: Literal["pixels", "wen", "dcr", "official", "official-288", "sscd-onnx"] = "pixels",
    sscd: str | None = None,
    sscd_sha256: str | None = None,
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
        rivals: other methods on the same generations, such as [anisotropy,loss]; density_l2, density_copies, anisotropy, loss.
        measure: of copy similarity, for density_copies; as of `memfilter evaluate`.
        sscd: TorchScript file of SSCD, for a preset. It is a program: use none that you do not trust.
        sscd_sha256: of that file; without it, it must be the preset's own.
        quick: break every generation off after the first steps; leaves the metric of all steps and the rivals out.
        batch_size: pictures at a time.
    """
    from memfilter.eval.sscd import measure_named
    from memfilter.inference.detection import Sampling, judge, require_rivals
    from memfilter.inference.models import Model
    from memfilter.inference.table import SUFFIXES, asked_prompts, measured_names, measured_rows, verdict, write_rows
    from memfilter.processes import end_processes

    # what cannot be done is refused before the work begins
    place, counted, rivals, clean_file = Path(out), first or None, rivals or [], Path(clean) if clean else None
    if place.suffix not in SUFFIXES:
        raise ValueError(f"out: {out} must end in one of {', '.join(SUFFIXES)}")
    left = place.with_suffix(".clean.json")
    for name, file, written in (("prompts", prompts, (place, left)), ("clean", clean, (place,))):
        if file is not None and Path(file).resolve() in [path.resolve() for path in written]:
            raise ValueError(f"{name}: {file} would be written over: name another out")
    _at_least(0, first=first)
    _at_least(1, batch_size=batch_size)
    if quick and (not counted or rivals):
        raise ValueError("rivals need whole generations: leave quick out" if rivals else
                         "quick needs first above 0: after so many steps a generation is broken off")  # fmt: skip
    if first > steps:
        raise ValueError(f"first is {first}, more than steps, which is {steps}")
    require_rivals(rivals, seeds)
    chosen = Model(model)
    asked = asked_prompts(chosen, Path(prompts) if prompts else None, taken=measured_names(first))
    sampling = Sampling(seeds, steps, guidance_scale, size or chosen.size)
    if counted and counted < (readable := sampling.first_readable(chosen.pipeline)):
        raise ValueError(f"first is {first}, and before step {readable} no norm can be read, at zero terminal SNR: ask for more")
    measured = measure_named(measure, Path(sscd) if sscd else None, sscd_sha256, chosen.state.device)
    place.parent.mkdir(parents=True, exist_ok=True)

    # the work
    more = {"batch_size": batch_size, "until": counted if quick else None}
    ground = chosen.clean_norms(clean_file, sampling, left, rate=false_positive_rate, **more)
    ground.threshold(false_positive_rate, counted, seeds)
    if "anisotropy" in rivals:
        ground.spread(seeds)
    work = place.with_name(f".{place.name}.parts")
    signals, parts = chosen.measure([row["prompt"] for row in asked], sampling, work, rivals=rivals, measure=measured, **more)
    threshold, p_values = judge(signals, ground, false_positive_rate, counted)
    if chosen.state.is_main_process:
        rows = measured_rows(asked, signals, ground, threshold, p_values, first, whole=not quick)
        write_rows(rows, place)
        parts.remove()
        print(verdict(rows, threshold, false_positive_rate))
        print(place)
    end_processes()


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")


def explain(
    model: str,
    prompt: str,
    out: str | None = None,
    seeds: int = 4,
    steps: int = 50,
    at: list[int] | None = None,
    guidance_scale: float = 7.5,
    size: int | None = None,
    batch_size: int = 16,
    of: Literal["left_out", "words", "encoded"] = "left_out",
    colour: Literal["auto", "always", "never"] = "auto",
) -> None:
    """Show which words of a prompt its strong answer hangs on.

    A word's score is by how much the norm falls without it; or the significance score of Wen et al. (section 4.1), the length of the
    norm's gradient with respect to a token's embedding, of which a word has the largest of its tokens'. Means over seeds and steps.
    Prints the prompt with its words coloured by score, and a bar for each.

    Args:
        model: directory of a run, of a diffusers pipeline, a hub id, or "scenes".
        prompt: to be explained.
        out: .json for words, tokens and scores, or .png for the bars.
        seeds: generations that the mean is over.
        steps: of the sampler.
        at: steps of it, counted from 0, at which scores are taken, such as [0,10,20]; by default a quarter of them, from the first
            that can be read, of left_out that one alone. The paper takes all.
        guidance_scale: of classifier-free guidance, above 1.
        size: height and width in pixels; by default the run's, or what the model was made for.
        batch_size: pictures at a time.
        of: left_out: by how much the norm falls without the word. Or the gradient at embeddings, words, as the text encoder is given
            them, or encoded, as it puts them out: the paper's, where what follows a word holds that word too.
        colour: of the line; auto where the output is a terminal.
    """
    from memfilter.data.prompts import require_prompt
    from memfilter.inference.detection import Sampling
    from memfilter.inference.models import Model
    from memfilter.inference.showing import bars, coloured, write_words
    from memfilter.inference.significance import token_significance

    if out is not None and Path(out).suffix not in (".json", ".png"):
        raise ValueError(f"out: {out} must end in .json or .png")
    _at_least(1, batch_size=batch_size)
    require_prompt(prompt, "prompt")
    chosen = Model(model)
    sampling = Sampling(seeds, steps, guidance_scale, size or chosen.size)
    words = token_significance(chosen.pipeline, prompt, sampling, at, batch_size=batch_size, of=of)
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
    batch_size: int = 16,
) -> None:
    """Generate pictures, with a mitigation for prompts that are memorized.

    Writes a PNG for each prompt and seed, and pictures.jsonl, which says what was done and what the norms were. Several
    processes share the work: accelerate launch -m memfilter.cli generate ... What was interrupted goes on when it is run again.

    Args:
        model: directory of a run, of a diffusers pipeline, a hub id, or "scenes".
        out: directory.
        prompt: one prompt.
        prompts: file of prompts instead; as `memfilter detect` takes it.
        seeds: pictures of each prompt.
        mitigation: none; prompt moves its embedding until the first step's norm of each picture is at most target, by ten
            steps at most (Wen et al., section 4.2); rta adds random tokens (Somepalli et al.).
        when: whether only for prompts that are detected as memorized by their first step, or always.
        target: norm to come down to, for prompt; by default the median of clean prompts.
        tokens: so many, for rta.
        clean: prompts that are certainly not memorized or their norms, as `memfilter detect` takes and leaves them; needed for
            detection, and for a target that is not given. By default, for models of clipart scenes, captions of new scenes.
        false_positive_rate: of the detection.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance, above 1.
        size: height and width in pixels; by default the run's, or what the model was made for.
        batch_size: pictures at a time, of one prompt.
    """
    from memfilter.data.prompts import require_prompt
    from memfilter.inference.detection import Sampling
    from memfilter.inference.generating import Mitigation, write_pictures
    from memfilter.inference.models import Model
    from memfilter.inference.table import asked_prompts
    from memfilter.processes import end_processes

    _at_least(1, batch_size=batch_size)
    Mitigation(mitigation, None, 1.0 if target is None else target, tokens)
    if (prompt is None) == (prompts is None):
        raise ValueError("prompt, prompts: name one of them")
    if prompt is not None:
        require_prompt(prompt, "prompt")
    chosen, place = Model(model), Path(out)
    texts = [prompt] if prompts is None else [row["prompt"] for row in asked_prompts(chosen, Path(prompts))]
    sampling = Sampling(seeds, steps, guidance_scale, size or chosen.size)
    threshold = None
    if mitigation != "none" and (when == "detected" or (mitigation == "prompt" and target is None)):
        first = sampling.first_readable(chosen.pipeline)
        rate = false_positive_rate if when == "detected" else None
        ground = chosen.clean_norms(Path(clean) if clean else None, sampling, place / "clean.json", rate=rate, until=first,
                                    batch_size=batch_size)  # fmt: skip
        threshold = None if rate is None else ground.threshold(rate, first, seeds)
        target = ground.usual if target is None else target
    changed = write_pictures(chosen, texts, sampling, Mitigation(mitigation, threshold, target, tokens), place, batch_size)
    if chosen.state.is_main_process:
        print(f"{len(texts) * seeds:,} pictures, prompts changed for {changed:,} of {len(texts):,}. {place}")
    end_processes()


def app(
    model: str,
    clean: str | None = None,
    false_positive_rate: float = 0.01,
    first: int = 10,
    seeds: int = 4,
    steps: int = 20,
    guidance_scale: float = 7.5,
    size: int | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Open a page to try prompts on: pictures, whether the prompt is memorized, by which words, and what helps.

    Norms of clean prompts are measured first, which takes a while, and kept in the user's cache (~/.cache/memfilter, or
    XDG_CACHE_HOME) for the next time. Those of the embedded model come with it.

    Args:
        model: directory of a run, of a diffusers pipeline, a hub id, or "scenes", the model that comes with the package.
        clean: file of prompts that are certainly not memorized, or .json of their norms. By default, for models of clipart
            scenes, captions of new scenes.
        false_positive_rate: share of clean prompts that may be called memorized.
        first: steps that the verdict goes by, as of `memfilter detect`; 0, or as many as there are, for all.
        seeds: pictures of each prompt.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance, above 1.
        size: height and width in pixels; by default the run's, or what the model was made for.
        host: address to listen at; 0.0.0.0 lets other machines in.
        port: to listen at; 0 for any that is free.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port must be among 0 ... 65535, found {port}")
    _at_least(0, first=first)

    from memfilter.inference.app import serve
    from memfilter.inference.detection import Sampling
    from memfilter.inference.models import SHIPPED_PROMPTS, Model

    chosen = Model(model)
    sampling = Sampling(seeds, steps, guidance_scale, size or chosen.size)
    ground = chosen.clean_norms(Path(clean) if clean else None, sampling, rate=false_positive_rate, count=SHIPPED_PROMPTS)
    serve(chosen, ground, sampling, false_positive_rate, first if 0 < first < steps else None, host, port)
