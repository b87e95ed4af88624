"""The page of a Space: what it computes and says, as a stranger's program, and in a real browser."""

import importlib.util
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import LAYERS, made, processor, save
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hf_nose.export_space import export_space
from hf_nose.profiling import count_parameters
from hf_nose.timing import median_interval, verdict


TESTS = Path(__file__).resolve().parent
APP = TESTS.parent / "hf_nose" / "assets" / "space_app.py"
NAMES = {0: "ant", 1: "<b>bee</b>", 2: "crane", 3: "crane", 4: "eel"}


def loaded(path: Path):
    """The page's code as a module."""
    spec = importlib.util.spec_from_file_location("space_app", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


app = loaded(APP)


def named(kind: str):
    model = made(kind)
    model.config.id2label, model.config.label2id = NAMES, {name: index for index, name in NAMES.items()}
    return model


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The folder of a Space of tiny models."""
    root = tmp_path_factory.mktemp("space")
    save(named("dense"), root / "dense")
    return export_space(save(named("folded"), root / "tiny-vit"), root / "out", dense=root / "dense")


@pytest.fixture
def picture():
    """No square, and not the same upside down."""
    return Image.fromarray(np.random.default_rng(5).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def classifiers():
    return {
        "dense": app.Classifier(named("dense"), processor()),
        "compressed": app.Classifier(named("folded"), processor()),
    }


def seconds_of(ratio, spread=0.0):
    """As `take_turns` gives them: the compressed model `ratio` times as fast, more and less by turns."""
    wobble = [1 + spread * (-1) ** turn for turn in range(app.ROUNDS)]
    return {"dense": [0.2] * app.ROUNDS, "compressed": [0.2 / (ratio * part) for part in wobble]}


def test_likeliest_classes_first_and_twins_told_apart(picture):
    classifier = classifiers()["dense"]
    pixels = processor()(picture, return_tensors="pt").pixel_values
    found = app.predict(classifier, pixels)
    wanted = classifier.model(pixels).logits[0].detach().softmax(-1)
    keys = ["ant", "<b>bee</b>", "crane (class 2)", "crane (class 3)", "eel"]
    order = wanted.argsort(descending=True).tolist()
    assert list(found) == [keys[index] for index in order]
    assert list(found.values()) == pytest.approx([float(wanted[index]) for index in order])


def test_fewer_classes_are_asked_for_than_there_are(picture, monkeypatch):
    monkeypatch.setattr(app, "TOP", 2)
    pixels = processor()(picture, return_tensors="pt").pixel_values
    assert len(app.predict(classifiers()["dense"], pixels)) == 2


def test_turns_are_taken_and_the_first_not_counted():
    order, ticks = [], itertools.count()
    calls = {name: lambda name=name: order.append(name) for name in app.NAMES}
    found = app.take_turns(calls, lambda: next(ticks) ** 2)
    assert order == list(app.NAMES) * (app.WARMUP + app.ROUNDS)
    assert all(len(values) == app.ROUNDS for values in found.values())
    # The clock is read as often in the rounds that are not counted as the library's stopwatch is started.
    started = itertools.count(start=2 * app.WARMUP)
    assert found["dense"][0] == (next(started) + 1) ** 2 - (2 * app.WARMUP) ** 2


@given(st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=app.ROUNDS, max_size=app.ROUNDS))
def test_the_verdict_is_the_librarys(pairs):
    """Median, 95 % interval and words of `hf_nose.timing`, in the few lines that travel."""
    dense, compressed = zip(*pairs, strict=True)
    found = app.compare({"dense": dense, "compressed": compressed})
    ratios = [theirs / ours for theirs, ours in pairs]
    assert found.seconds == {"dense": statistics.median(dense), "compressed": statistics.median(compressed)}
    assert found.ratio == statistics.median(ratios) and found.interval == median_interval(ratios)
    assert found.verdict == verdict(found.interval)


@pytest.mark.parametrize(
    "ratio, spread, words",
    [
        (1.25, 0.01, "Compressed is 1.24 times as fast as dense. "),
        (1.0, 0.1, "Compressed is not faster: no difference shown (0.90 times as fast as dense). "),
        (0.8, 0.01, "Compressed is not faster: slower (0.79 times as fast as dense). "),
    ],
)
def test_what_is_not_faster_is_said_not_to_be(ratio, spread, words):
    # 15 turns: eight of the lower ratio, so that is the median.
    seconds = seconds_of(ratio, -spread)
    found = {"dense": {"a": 0.6, "b": 0.4}, "compressed": {"a": 0.5, "b": 0.5}}
    said = app.verdict_words(found, app.compare(seconds))
    assert words in said and "Both put the same class first." in said
    assert ("faster" in words) == ("not faster" in said)
    found["compressed"] = {"b": 0.6, "a": 0.4}
    assert "They put different classes first." in app.verdict_words(found, app.compare(seconds))


def test_bars_are_as_long_as_the_times():
    speed = app.compare(seconds_of(2.0))
    assert "200.0 ms" in app.time_words("dense", speed) and "width: 100.0%" in app.time_words("dense", speed)
    compressed = app.time_words("compressed", speed)
    assert "100.0 ms" in compressed and "width: 50.0%" in compressed and "Compressed, median time" in compressed


def test_each_model_gets_the_pixels_of_its_own_processor_one_picture_at_a_time(picture):
    pair = classifiers()
    pair["compressed"] = pair["compressed"]._replace(processor=type(processor())(size={"height": 16, "width": 16}))
    seen = {name: [] for name in app.NAMES}
    handles = [
        part.model.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0]))
        for name, part in pair.items()
    ]
    ticks = itertools.count()
    found, speed = app.run(pair, picture, lambda: float(next(ticks)))
    for handle in handles:
        handle.remove()
    assert speed.seconds == {"dense": 1.0, "compressed": 1.0} and speed.verdict == "not faster: no difference shown"
    for name, part in pair.items():
        pixels = part.processor(picture, return_tensors="pt").pixel_values
        assert len(seen[name]) == 1 + app.WARMUP + app.ROUNDS
        assert all(torch.equal(given, pixels) and len(given) == 1 for given in seen[name])
        assert found[name] == app.predict(part, pixels)


def test_which_layers_are_gone():
    said = app.layer_strip(6, LAYERS)
    blocks = said.split('<div class="nose-block">')[1:]
    assert len(blocks) == 6
    assert [index for index, block in enumerate(blocks) if "nose-gone" in block.split("</div>")[0]] == LAYERS
    assert all(block.split("</div>")[0].endswith(f"</span>{index}") for index, block in enumerate(blocks))
    assert 'aria-label="Blocks without attention: 1, 3, 4"' in said and "attention removed" in said
    words = app.title({"name": "<script>x</script>"}, LAYERS, 6)
    assert "<script>" not in words and "without the attention of 3 of its 6 blocks (1, 3, 4; counted from 0)" in words


def test_parameters_and_accuracy():
    dense, folded = count_parameters(made("dense")), count_parameters(made("folded"))
    pair = classifiers()
    said = app.facts(pair, {"top1": None, "dense": None})
    wanted = f"{dense / 1e6:.2f} M dense, {folded / 1e6:.2f} M compressed ({folded / dense - 1:+.1%})"
    assert wanted in said and "was not measured" in said
    top1 = {"dense": 0.9533, "compressed": 0.9412, "num_images": 1450}
    said = app.facts(pair, {"top1": top1, "dense": "dense"})
    assert "Top-1 accuracy on 1,450 images: 95.3% dense, 94.1% compressed." in said and "measured" not in said
    assert "total steps" not in said
    assert "Both were trained for the same total steps." in app.facts(pair, {"top1": top1, "dense": "dense_control"})


def test_how_the_times_were_taken():
    said = app.method("cpu")
    assert f"after {app.WARMUP} runs to warm up, the median of {app.ROUNDS} runs" in said
    assert f"threads: {torch.get_num_threads()}, float32, torch {torch.__version__}" in said


STRANGER = """
import json, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_nose", "gradio"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, sys.argv[1])
import app
from PIL import Image
pair = {name: app.load(app.HERE / name, "cpu") for name in app.NAMES}
found, speed = app.run(pair, Image.open(sys.argv[2]))
files = [type(part.model).__module__ for part in pair.values()]
print(json.dumps({"found": found, "seconds": speed.seconds, "modules": files}))
"""


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    return {**kept, "HF_HOME": str(folder / "cache"), "GRADIO_TEMP_DIR": str(folder / "uploads")}


@pytest.mark.slow
def test_it_runs_where_neither_hf_nose_nor_gradio_is_installed(space, picture, tmp_path):
    picture.save(tmp_path / "picture.png")
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(space), str(tmp_path / "picture.png")],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert all(name.startswith("transformers_modules.") for name in said["modules"])
    for name, part in classifiers().items():
        wanted = app.predict(part, processor()(picture, return_tensors="pt").pixel_values)
        assert list(said["found"][name]) == list(wanted)
        assert list(said["found"][name].values()) == pytest.approx(list(wanted.values()), abs=1e-5)
        assert said["seconds"][name] > 0


@pytest.fixture(scope="module")
def served(space, tmp_path_factory):
    """The page's address; skipped where gradio, playwright or Chromium is missing."""
    for package in ("gradio", "playwright"):
        pytest.importorskip(package, reason=f"the browser test needs {package} (extra: browser)")
    if shutil.which("chromium") is None:
        pytest.skip("the browser test needs chromium")
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, str(space / "app.py")],
            cwd=folder,
            env={**environment(folder), "GRADIO_SERVER_PORT": str(port)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}/"
            for _ in range(240):
                assert server.poll() is None, (folder / "log").read_text()
                try:
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                except urllib.error.URLError:
                    time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(served, picture, tmp_path, width):
    """A picture that lies on its side, as telephones save it, with a class whose name is HTML."""
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "picture.png", exif=turned)
    words = [served, str(tmp_path / "picture.png"), str(tmp_path / "shot.png"), str(width), shutil.which("chromium")]
    done = subprocess.run(
        [sys.executable, str(TESTS / "space_browser.py"), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["errors"] == said["strangers"] == []
    assert app.HINT in said["before"] and app.HINT not in said["body"]
    assert said["gone"] == LAYERS and said["overflow"] <= 0
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "picture.png"))
    for number, (name, part) in enumerate(classifiers().items()):
        wanted = app.predict(part, processor()(upright, return_tensors="pt").pixel_values)
        assert said[name] == [[key, f"{100 * value:.0f}%"] for key, value in wanted.items()]
        assert f"{name.capitalize()}, median time" in said["times"][number] and " ms" in said["times"][number]
    assert said["verdict"].startswith("Compressed is ") and "95 % interval" in said["verdict"]
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.width == width and len(shot.convert("RGB").getcolors(1 << 24)) > 50
