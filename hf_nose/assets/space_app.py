"""
A page that shows a picture to two Vision Transformers, one with all its attention and the same with layers removed:
what each sees in it, how long each takes, and which layers are gone. It needs no network.

    pip install -r requirements.txt && python app.py
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification


HERE = Path(__file__).resolve().parent
# The two folders, in the order in which the models take turns.
NAMES = ("dense", "compressed")
TOP = 5
WARMUP, ROUNDS = 3, 15
# The true median lies between the 4th smallest and the 4th largest of 15 values with at least 95 % confidence.
RANK = 4
# The system's own.
FONTS = ["system-ui", "sans-serif"]
HINT = "Upload a picture to see both predictions and their times."
CSS = """
.nose-strip {display: flex; flex-wrap: wrap; gap: 6px; margin: 10px 0 6px}
.nose-block {width: 44px; text-align: center; font-size: 12px}
.nose-block span, .nose-legend span {display: block; border-radius: 4px; box-sizing: border-box}
.nose-block span {height: 26px; margin-bottom: 3px}
.nose-legend {display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; align-items: center}
.nose-legend div {display: flex; gap: 6px; align-items: center}
.nose-legend span {width: 16px; height: 16px}
.nose-attention {background: #2563eb}
.nose-mlp {background: #94a3b8}
.nose-gone {border: 2px dashed #dc2626;
    background: linear-gradient(to top right, transparent 46%, #dc2626 46%, #dc2626 54%, transparent 54%)}
.nose-time {font-size: 22px; font-weight: 600; line-height: 1.3; margin: 0 0 6px}
.nose-time small, .nose-verdict small {display: block; font-size: 13px; font-weight: 400; line-height: 1.5}
.nose-bar {height: 10px; border-radius: 5px; background: #0f766e; min-width: 4px}
.nose-verdict {font-size: 20px; font-weight: 600; line-height: 1.4}
.nose-small {font-size: 13px; margin: 8px 0}
"""


class Classifier(NamedTuple):
    """A model and what makes its pixels of a picture."""

    model: Any
    processor: Any


class Speed(NamedTuple):
    """
    Median seconds by name; the median over rounds of how many times as fast compressed is, with the interval that
    holds it at 95 % confidence; and the verdict: `"faster"` only where the whole interval lies above 1.
    """

    seconds: dict[str, float]
    ratio: float
    interval: tuple[float, float]
    verdict: str


def load(folder: Path, device: str) -> Classifier:
    """The checkpoint in `folder`, by the code beside its weights, in float32."""
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return Classifier(model.to(device).eval(), AutoImageProcessor.from_pretrained(folder, backend="pil"))


@torch.inference_mode()
def predict(classifier: Classifier, pixels: torch.Tensor) -> dict[str, float]:
    """
    Probabilities of the likeliest classes by name, likeliest first. `pixels` is (1, channels, height, width). Classes
    that share a name, as ImageNet's two cranes do, are told apart by their number.
    """
    names = classifier.model.config.id2label
    likely = classifier.model(pixels).logits[0].softmax(-1).topk(min(TOP, len(names)))
    shared = {name for name in names.values() if list(names.values()).count(name) > 1}
    found = {}
    for probability, index in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
        name = names[index]
        found[f"{name} (class {index})" if name in shared else name] = probability
    return found


def take_turns(
    calls: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every call by name, in turns, so that a machine that slows down slows all; warmed up first."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARMUP + ROUNDS):
        for name, call in calls.items():
            start = clock()
            call()
            if turn >= WARMUP:
                seconds[name].append(clock() - start)
    return seconds


def compare(seconds: Mapping[str, Sequence[float]]) -> Speed:
    """What [`take_turns`] found."""
    dense, compressed = (seconds[name] for name in NAMES)
    ratios = sorted(theirs / ours for theirs, ours in zip(dense, compressed, strict=True))
    lower, upper = ratios[RANK - 1], ratios[-RANK]
    verdict = "not faster: no difference shown"
    if lower > 1:
        verdict = "faster"
    elif upper < 1:
        verdict = "not faster: slower"
    medians = {name: statistics.median(seconds[name]) for name in NAMES}
    return Speed(medians, statistics.median(ratios), (lower, upper), verdict)


def run(
    classifiers: Mapping[str, Classifier], picture: Image.Image, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, dict[str, float]], Speed]:
    """Both predictions of an upright RGB picture, by name, and how long the models take for it at batch 1."""
    pixels = {
        name: processor(picture, return_tensors="pt").pixel_values.to(model.device)
        for name, (model, processor) in classifiers.items()
    }
    found = {name: predict(classifiers[name], pixels[name]) for name in NAMES}
    with torch.inference_mode():
        # Back on the CPU, so that a device that computes beside the process has finished.
        calls = {name: lambda name=name: classifiers[name].model(pixels[name]).logits.cpu() for name in NAMES}
        return found, compare(take_turns(calls, clock))


def layer_strip(num_layers: int, removed: Sequence[int]) -> str:
    """The blocks as HTML, each with its attention, there or gone, above its MLP."""
    gone = ", ".join(map(str, removed))
    cells = "".join(
        f'<div class="nose-block"><span class="{"nose-gone" if layer in removed else "nose-attention"}"></span>'
        f'<span class="nose-mlp"></span>{layer}</div>'
        for layer in range(num_layers)
    )
    legend = "".join(
        f'<div><span class="nose-{kind}"></span>{words}</div>'
        for kind, words in (("attention", "attention kept"), ("gone", "attention removed"), ("mlp", "MLP, all kept"))
    )
    return (
        f'<div class="nose-strip" role="img" aria-label="Blocks without attention: {gone}">{cells}</div>'
        f'<div class="nose-legend">{legend}</div>'
    )


def title(about: Mapping[str, Any], removed: Sequence[int], num_layers: int) -> str:
    """The head of the page as HTML."""
    gone = ", ".join(map(str, removed))
    return (
        f"<h1>{escape(about['name'])}</h1><p>The same Vision Transformer twice: <b>dense</b>, with all "
        f"{num_layers} attention layers, and <b>compressed</b>, without the attention of {len(removed)} of its "
        f"{num_layers} blocks ({gone}; counted from 0).</p>"
    )


def facts(classifiers: Mapping[str, Classifier], about: Mapping[str, Any]) -> str:
    """Parameters and measured accuracy in a line of HTML."""
    dense, compressed = (classifiers[name].model.num_parameters() for name in NAMES)
    words = f"Parameters: {millions(dense)} dense, {millions(compressed)} compressed ({compressed / dense - 1:+.1%})."
    top1 = about["top1"]
    if top1 is None:
        words += " The accuracy of this pair was not measured, and one picture tells nothing about it."
    else:
        dense_top1, compressed_top1 = (f"{top1[name]:.1%}" for name in NAMES)
        words += f" Top-1 accuracy on {top1['num_images']:,} images: {dense_top1} dense, {compressed_top1} compressed."
    if about["dense"] == "dense_control":
        words += " Both were trained for the same total steps."
    return f'<p class="nose-small">{words}</p>'


def millions(count: int) -> str:
    """A number of parameters for people."""
    return f"{count / 1e6:.2f} M"


def time_words(name: str, speed: Speed) -> str:
    """The time of a model as HTML, with a bar as long as its share of the slower one's."""
    seconds = speed.seconds[name]
    share = seconds / max(speed.seconds.values())
    return (
        f'<p class="nose-time"><small>{name.capitalize()}, median time</small>{1000 * seconds:.1f} ms</p>'
        f'<div class="nose-bar" style="width: {share:.1%}"></div>'
    )


def verdict_words(found: Mapping[str, Mapping[str, float]], speed: Speed) -> str:
    """What the comparison comes to, as HTML."""
    lower, upper = speed.interval
    measured = f"{speed.ratio:.2f} times as fast as dense"
    speaks = measured if speed.verdict == "faster" else f"{speed.verdict} ({measured})"
    first = [next(iter(found[name])) for name in NAMES]
    agree = "Both put the same class first." if first[0] == first[1] else "They put different classes first."
    return (
        f'<p class="nose-verdict">Compressed is {speaks}. {agree}'
        f"<small>Median ratio of {ROUNDS} turns, 95 % interval {lower:.2f} to {upper:.2f}; for this picture, on this "
        "machine, now.</small></p>"
    )


def method(device: str) -> str:
    """How the times were taken and on what, as HTML."""
    where = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), threads: {torch.get_num_threads()}"
    if device == "cuda":
        where = torch.cuda.get_device_name(device)
    return (
        f'<p class="nose-small">Times: one picture at a time, from pixels to class scores; after {WARMUP} runs to '
        f"warm up, the median of {ROUNDS} runs of each model, in turns. Both models go through the same code and "
        "compute nothing but the class token behind their last attention, so that they differ by the removed layers "
        f"alone. Runs on: {where}, float32, torch {torch.__version__}.</p>"
    )


def build(folder: Path = HERE) -> Any:
    """The page with the models in `folder`, a `gradio.Blocks`."""
    import gradio as gr

    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifiers = {name: load(folder / name, device) for name in NAMES}
    about = json.loads((folder / "space.json").read_text(encoding="utf-8"))
    config = classifiers["compressed"].model.config
    removed = config.removed_attention_layers

    def show(picture: Image.Image | None) -> tuple[Any, ...]:
        if picture is None:
            return "", "", None, None, HINT
        found, speed = run(classifiers, picture)
        times = [time_words(name, speed) for name in NAMES]
        return *times, *found.values(), verdict_words(found, speed)

    # Uploaded pictures are deleted after an hour.
    with gr.Blocks(title=about["name"], delete_cache=(3600, 3600)) as page:
        gr.HTML(title(about, removed, config.num_hidden_layers))
        gr.HTML(layer_strip(config.num_hidden_layers, removed) + facts(classifiers, about))
        with gr.Row():
            with gr.Column(min_width=260):
                picture = gr.Image(type="pil", label="Picture", sources=["upload", "clipboard"], height=320)
                again = gr.Button("Run again")
            times, labels = [], []
            # Side by side as long as there is room for both.
            with gr.Column(scale=2, min_width=416), gr.Row():
                for name in NAMES:
                    with gr.Column(min_width=200):
                        times.append(gr.HTML())
                        labels.append(gr.Label(label=name.capitalize(), show_heading=False, elem_id=name))
        verdict = gr.HTML(HINT)
        gr.HTML(method(device))
        # One at a time: two at once would slow each other.
        happens, outputs = [picture.change, again.click], [*times, *labels, verdict]
        gr.on(happens, show, picture, outputs, concurrency_limit=1, show_progress_on=labels)
    return page


def main() -> None:
    """Serves the page. Nothing is sent anywhere, and no run is recorded."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build()
    from gradio import themes

    theme = themes.Default(primary_hue="teal", font=FONTS, font_mono=FONTS)
    page.launch(theme=theme, css=CSS, footer_links=[], run_history=False, ssr_mode=False, max_file_size="20mb")


if __name__ == "__main__":
    main()
