"""The page of ``memfilter app``: type a prompt, see whether it is memorized, by which words, and what helps."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass

import gradio as gr
import numpy as np
import plotly.graph_objects as go

from memfilter.data.prompts import require_prompt
from memfilter.eval.runs import Prompt
from memfilter.inference.clean import CleanNorms, mean_norm, rounded
from memfilter.inference.detection import Sampling
from memfilter.inference.generating import Generated, Mitigation, generate_prompt
from memfilter.inference.models import Model
from memfilter.inference.showing import shares
from memfilter.inference.significance import Word, token_significance

TITLE = "memfilter"
EXAMPLES = 12  # prompts of a run to pick from, of each kind
# fonts and scripts come from the machine itself: the page asks no other host for anything
CSS = """
.gradio-container { max-width: 1100px !important; margin: auto }
#verdict { font-size: 1.15rem }
"""


@dataclass
class Look:
    """What the page shows of a prompt.

    Args:
        made: pictures and norms.
        words: with their scores; none of a mitigation's.
        metric: mean norm of the steps that the verdict goes by.
        p_value: of the metric.
        memorized: whether the metric reaches the threshold.
    """

    made: Generated
    words: list[Word]
    metric: float
    p_value: float
    memorized: bool


class Studio:
    """A model, and what its answers are held against.

    Args:
        model: to be looked at.
        clean: norms of clean prompts, generated as ``sampling`` says.
        false_positive_rate: of the verdict.
        first: steps that it goes by; None for all.
    """

    def __init__(
        self, model: Model, clean: CleanNorms, sampling: Sampling, false_positive_rate: float = 0.01, first: int | None = None
    ):
        self.model, self.clean, self.sampling, self.first = model, clean, sampling, first
        self.threshold = clean.threshold(false_positive_rate, first, sampling.seeds)
        self._training = self._prompts_of_the_run()
        self._one_at_a_time = threading.Lock()  # hooks see all that the denoiser does

    def look(self, prompt: str, mitigation: Mitigation = Mitigation()) -> Look:
        """Generates, judges and, without a mitigation, scores the words."""
        with self._one_at_a_time:
            made = generate_prompt(self.model.pipeline, prompt, self.sampling, mitigation)
            words = [] if mitigation.kind != "none" else token_significance(self.model.pipeline, prompt, self.sampling, of="left_out")
        metric = float(mean_norm(made.norms[None], self.first)[0])
        p_value = float(self.clean.p_values(np.array([metric]), self.first, self.sampling.seeds)[0])
        return Look(made, words, metric, p_value, metric >= self.threshold)

    def _prompts_of_the_run(self) -> dict[str, Prompt]:
        """By caption: its duplicates and some others; none where the training data cannot be had any more."""
        asked: list[Prompt] = []
        if self.model.run is not None:
            with suppress(ValueError):
                asked = self.model.run.prompts(EXAMPLES)
        known: dict[str, Prompt] = {}
        for p in asked:  # duplicates come first, and count where a caption comes again
            known.setdefault(p.text, p)
        return known

    @property
    def examples(self) -> list[str]:
        """Some prompts of the run, duplicates first; clean ones where there is none that has some."""
        if not self._training:
            return self.model.clean_prompts(None, EXAMPLES) if self.model.of_scenes else []
        asked = self._training.values()
        return [p.text for duplicate in (True, False, None) for p in [p for p in asked if p.duplicate == duplicate][:EXAMPLES]]

    def shown(self, prompt: str, look: Look) -> list[tuple[np.ndarray, str]]:
        """Pictures with what they are: the training picture, where the prompt is that of a duplicate of the run or an example, and
        what was made."""
        own, side = [], look.made.pictures.shape[1]
        if known := self._training.get(prompt):
            with suppress(ValueError):  # a picture that cannot be read any more
                own = [(self.model.run.picture(known.key, side), "training picture")]
        return own + [(made, f"seed {seed}") for seed, made in enumerate(look.made.pictures)]


def in_words(look: Look, studio: Studio) -> str:
    """The verdict, for people."""
    clean = studio.clean
    count, n = round(look.p_value * (len(clean.norms) + 1)) - 1, len(clean.norms)
    as_strong = f"none of {n}" if count == 0 else f"{count} of {n}"
    verdict = "Memorized" if look.memorized else "Not memorized, as far as the norm tells"
    over = "" if studio.first is None else " at the first step" if studio.first == 1 else f" over the first {studio.first} steps"
    return (f"**{verdict}.** The model answers this prompt with a mean norm of {look.metric:.3g}{over}; {as_strong} clean prompts "
            f"are answered as strongly (p = {look.p_value:.2g}).")  # fmt: skip


def what_came_of(look: Look, before: Look, how: Mitigation, studio: Studio) -> str:
    """What a mitigation did, for people. An embedding that was moved to lower the norm has no p-value: clean ones were not."""
    if how.kind == "rta":
        return in_words(look, studio)
    return (f"The model answers with a mean norm of {look.metric:.3g} instead of {before.metric:.3g}; of clean prompts it is "
            f"{np.median(studio.clean.metric(studio.first)):.3g} in the median. The embedding was moved to lower the first "
            "step's, so this is no verdict: whether the picture is still a copy, look.")  # fmt: skip


def figure_of(look: Look, clean: CleanNorms, before: Look | None = None):
    """Norm by step, a line for each picture, over the band in which 90% of clean ones lie."""
    low, middle, high = clean.band()
    steps = np.arange(1, len(middle) + 1)
    figure = go.Figure()
    figure.add_scatter(x=steps, y=high, mode="lines", line={"width": 0}, showlegend=False, hoverinfo="skip")
    figure.add_scatter(x=steps, y=low, mode="lines", fill="tonexty", fillcolor="rgba(134,142,150,0.25)", line={"width": 0},
                       name="90% of clean pictures", hoverinfo="skip")  # fmt: skip
    figure.add_scatter(x=steps, y=middle, mode="lines", line={"color": "#868e96", "dash": "dot"}, name="median of clean ones")
    shown = [(before, "#e8590c", "as it is"), (look, "#1971c2", "mitigated")] if before else [(look, "#e8590c", "this prompt")]
    for one, colour, name in shown:
        for number, norms in enumerate(one.made.norms):
            figure.add_scatter(x=steps, y=norms, mode="lines", line={"color": colour, "width": 1.5}, name=name, legendgroup=name,
                               showlegend=number == 0)  # fmt: skip
    figure.update_layout(
        height=300, margin={"l": 50, "r": 10, "t": 10, "b": 40}, template="plotly_white",
        xaxis={"title": "step", "dtick": max(1, len(steps) // 10)}, yaxis_title="norm", legend={"orientation": "h", "y": 1.15},
    )  # fmt: skip
    return figure


def pieces(words: list[Word]) -> list[tuple[str, float | None]]:
    """Words and the spaces between them, as the coloured line takes them; a word stands at every even place."""
    shown: list[tuple[str, float | None]] = []
    for word, share in zip(words, shares(words), strict=True):
        shown += [(word.text, round(share, 3)), (" ", None)]
    return shown[:-1]


def without_word(prompt: str, place: int) -> str:
    """The prompt without the word at a place of `pieces`; as it is for a space."""
    words = prompt.split()
    return " ".join(words[: place // 2] + words[place // 2 + 1 :]) if place % 2 == 0 else prompt


def build(studio: Studio) -> gr.Blocks:
    """The page."""

    def checked(prompt: str) -> str:
        if not prompt or not prompt.strip():
            raise gr.Error("Type a prompt first.", print_exception=False)
        try:
            require_prompt(prompt, "prompt")
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return prompt.strip()

    def look(prompt: str):
        prompt = checked(prompt)
        found = studio.look(prompt)
        return (found, prompt, studio.shown(prompt, found), in_words(found, studio), figure_of(found, studio.clean),
                pieces(found.words), [], "", gr.update(visible=False))  # fmt: skip

    def mitigate(prompt: str, kind: str, target: float, tokens: int, before: Look | None, seen: str):
        prompt = checked(prompt)
        try:
            how = Mitigation("prompt" if kind == "prompt embedding" else "rta", None, target, int(tokens))
        except ValueError:
            raise gr.Error("Name a norm above 0 to come down to.", print_exception=False) from None
        if before is None or seen != prompt:
            before = studio.look(prompt)
        found = studio.look(prompt, how)
        instead = gr.update(value="\n".join(found.made.shown), visible=how.kind == "rta")
        return (before, prompt, studio.shown(prompt, before), in_words(before, studio),
                figure_of(found, studio.clean, before), pieces(before.words), list(found.made.pictures),
                what_came_of(found, before, how, studio), instead)  # fmt: skip

    def drop(prompt: str, event: gr.SelectData):
        return without_word(prompt, int(event.index[0] if isinstance(event.index, list | tuple) else event.index))

    # every picture that is shown is a file in the temporary directory, where it would stay: once an hour those of an hour ago go
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        last, seen = gr.State(None), gr.State("")
        gr.Markdown(f"# {TITLE}\nWhether a prompt is memorized, by which words, and what helps.")
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", scale=4, max_lines=3, elem_id="prompt")
            generate = gr.Button("Generate", variant="primary", scale=1, elem_id="go")
        picked = gr.Dropdown(studio.examples, label="Prompts of this model", value=None, elem_id="picked")
        verdict = gr.Markdown(elem_id="verdict", sanitize_html=True)
        with gr.Row():
            gallery = {"columns": 3, "height": 360, "object_fit": "contain", "format": "png"}
            pictures = gr.Gallery(label="As it is", elem_id="pictures", **gallery)
            mitigated = gr.Gallery(label="Mitigated", elem_id="mitigated", **gallery)
        told = gr.Markdown(elem_id="told", sanitize_html=True)
        instead = gr.Textbox(label="Shown with random tokens", elem_id="instead", interactive=False, max_lines=8, visible=False)
        words = gr.HighlightedText(label="What the answer hangs on; click a word to drop it", elem_id="words",
                                   combine_adjacent=False, show_legend=False, interactive=False)  # fmt: skip
        plot = gr.Plot(show_label=False, elem_id="plot")
        with gr.Row():
            kind = gr.Radio(["prompt embedding", "random tokens"], value="prompt embedding", label="Mitigation", elem_id="kind")
            target = gr.Number(rounded(studio.clean.usual, 3), label="Norm to come down to (prompt embedding)", elem_id="target")
            tokens = gr.Slider(1, 8, value=4, step=1, label="Random tokens")
            try_it = gr.Button("Mitigate", elem_id="mitigate")
        shown = [last, seen, pictures, verdict, plot, words, mitigated, told, instead]
        gr.on([generate.click, prompt.submit], look, prompt, shown, concurrency_limit=1)
        try_it.click(mitigate, [prompt, kind, target, tokens, last, seen], shown, concurrency_limit=1)
        picked.input(lambda text: text, picked, prompt).then(look, prompt, shown, concurrency_limit=1)
        words.select(drop, seen, prompt).then(look, prompt, shown, concurrency_limit=1)
    return page


def serve(
    model: Model, clean: CleanNorms, sampling: Sampling, false_positive_rate: float, first: int | None, host: str, port: int
) -> None:
    """Opens the page, says where, and stays until it is stopped.

    Raises:
        ValueError: the port is taken, or a false positive rate that the clean prompts do not carry.
    """
    page = build(Studio(model, clean, sampling, false_positive_rate, first))
    # no fonts of another host: the page shows prompts that are nobody else's business
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = page.queue().launch(
            server_name=host, server_port=port or None, prevent_thread_lock=True, quiet=True, share=False, inbrowser=False,
            theme=theme, css=CSS, show_error=True, footer_links=[], ssr_mode=False,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"host, port: {host}:{port} cannot be listened at ({error})") from error
    print(f"{model.name}: {address}", flush=True)
    page.block_thread()
