"""The benchmark as a job: what it measures, honestly, that it goes on where it stopped, and what it refuses."""

import json
import os
import socket
import statistics
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import ViTConfig, ViTForImageClassification

from hf_nose import benchmark
from hf_nose.benchmark import BenchmarkOptions, run_benchmark
from hf_nose.cli import BAD_INPUT, OK, main
from hf_nose.contenders import Contender


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense ViT."""
    path = tmp_path_factory.mktemp("benchmark") / "tiny-vit"
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=2, num_labels=5)).save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Matrices of seconds are not for tests."""
    monkeypatch.setattr("hf_nose.roofline.CPU_SIZES", ((32, 16, 64),))


def options(folder, **more):
    values = {
        "models": [folder],
        "removed": ["0,2"],
        "batch_sizes": ["1", "3"],
        "rounds": 7,
        "warmup": 1,
        "device": "cpu",
    }
    return BenchmarkOptions(**values | more)


def test_every_combination_is_a_group_of_all_models(folder):
    given = options(folder, dtypes=["float32", "bfloat16"], attentions=["eager", "sdpa"], chunk_size_feed_forward=5)
    path, record = run_benchmark(given)
    assert path is None and record["memory"] == []
    settings = [(group["dtype"], group["attention"], group["batch_size"]) for group in record["groups"]]
    assert settings == [(d, a, b) for d in ("float32", "bfloat16") for a in ("eager", "sdpa") for b in (1, 3)]
    for group in record["groups"]:
        names = [model["name"].removeprefix("tiny-vit ") for model in group["models"]]
        assert names == ["stock", "dense", "dense chunked", "0,2", "0,2 chunked"]
        first, dense, sliced, folded, _ = group["models"]
        assert first["ratio_to_first"] == 1.0 and folded["removed"] == [0, 2]
        for model in group["models"]:
            assert len(model["seconds"]) == group["rounds"] == 7
            assert model["images_per_s"] == pytest.approx(group["batch_size"] / model["latency_s"])
            rates = [other["gemm"]["macs_per_s"] for other in record["groups"] if other["dtype"] == group["dtype"]]
            share = model["images_per_s"] * model["macs_computed"] / max(rates)
            assert model["gemm_share"] == pytest.approx(share)
            assert sum(model["macs_by_part"].values()) == model["macs_computed"]
            assert model["verdict"].startswith(("faster", "not faster"))
        ratios = sorted(ours / theirs for ours, theirs in zip(dense["seconds"], sliced["seconds"], strict=True))
        assert sliced["ratio_to_plain"] == statistics.median(ratios) and "ratio_to_plain" not in dense
    assert record["hardware"]["device"] == "cpu" and "dtype" not in record["hardware"]


def test_an_injected_sleep_is_reported_by_that_much(folder, monkeypatch):
    build = Contender.build

    def sleepy(self, *where):
        model = build(self, *where)
        if self.removed:
            model.vit.embeddings.register_forward_hook(lambda *_: time.sleep(0.2))
        return model

    monkeypatch.setattr(Contender, "build", sleepy)
    _, record = run_benchmark(options(folder, batch_sizes=["2"], rounds=7))
    _, dense, folded = record["groups"][0]["models"]
    # A sleep is never shorter than it was asked to be.
    assert 0.195 < folded["latency_s"] - dense["latency_s"] < 0.3
    assert folded["ratio_to_first"] < 0.6 and folded["verdict"] == "not faster: slower"


def test_what_a_file_holds_is_not_measured_again(folder, tmp_path, monkeypatch):
    first = options(folder, batch_sizes=["1"])
    path, before = run_benchmark(first, tmp_path)
    assert json.loads(path.read_text())["groups"] == before["groups"]
    # Killed after its first group, it has that one.
    measured = []
    compare = benchmark.compare_throughput

    def counted(models, images, *more):
        measured.append(len(images))
        return compare(models, images, *more)

    monkeypatch.setattr(benchmark, "compare_throughput", counted)
    _, after = run_benchmark(options(folder, batch_sizes=["1", "3"]), tmp_path)
    # All but the shares of the rate of matrix products, of which the best counts.
    shares = {"gemm_share": 0.0}
    held, first_held = ([model | shares for model in each["groups"][0]["models"]] for each in (after, before))
    assert measured == [3] and held == first_held and len(after["groups"]) == 2
    # Another model takes its turn among the others: that is another group.
    _, more = run_benchmark(options(folder, batch_sizes=["1"], removed=["0,2", "1"]), tmp_path)
    assert measured == [3, 1] and len(more["groups"]) == 3
    _, anew = run_benchmark(first, tmp_path, overwrite=True)
    assert measured == [3, 1, 1] and len(anew["groups"]) == 1


def test_other_slices_are_another_model(folder, tmp_path, monkeypatch):
    """Under the same names: what was measured with slices of 5 tokens says nothing of slices of 7."""

    def in_budget(contender, *where):
        nothing = {"peak_bytes": 9, "allocated_bytes": None, "reserved_bytes": None, "weights_bytes": 1}
        return nothing | {"images": contender.chunk_size_feed_forward, "bytes_per_image": 2.0}

    monkeypatch.setattr(benchmark, "images_in_budget", in_budget)
    for tokens in (5, 7, 5):
        given = options(folder, removed=[], batch_sizes=["1"], chunk_size_feed_forward=tokens, memory_budget="1MB")
        _, record = run_benchmark(given, tmp_path)
    for section in ("groups", "memory"):
        assert [entry["models"][2]["chunk_size_feed_forward"] for entry in record[section]] == [5, 7]


def test_what_is_asked_for_anew_is_measured_and_the_rest_stays(folder, tmp_path, monkeypatch):
    def peak(contender, batch_size, *where):
        return {"peak_bytes": 1000 * batch_size, "allocated_bytes": None, "reserved_bytes": None}

    monkeypatch.setattr(benchmark, "probe", peak)
    for more in ({"rounds": 6}, {"rounds": 0, "memory": True}):
        _, record = run_benchmark(options(folder, batch_sizes=["1"], **more), tmp_path)
    (group,) = record["groups"]
    first = group["models"][0]["seconds"]
    assert group["rounds"] == len(first) == 6 and group["warmup"] == 1
    assert group["models"][0]["peak_bytes"] == 1000
    # More rounds replace the times, and leave the memory.
    _, record = run_benchmark(options(folder, batch_sizes=["1"], rounds=8), tmp_path)
    (group,) = record["groups"]
    assert group["rounds"] == len(group["models"][0]["seconds"]) == 8 and group["models"][0]["peak_bytes"] == 1000


def test_a_disturbed_rate_of_products_makes_no_share_larger(folder, monkeypatch):
    """Once the machine has shown what it can do, a slower moment of it does not count."""
    rates = iter([100.0, 70.0, 10.0, 20.0])
    monkeypatch.setattr(benchmark, "gemm_rate", lambda *where: {"macs_per_s": next(rates), "size": [1, 1, 1]})
    _, record = run_benchmark(options(folder, batch_sizes=["1", "3"]))
    assert [group["gemm"]["macs_per_s"] for group in record["groups"]] == [100.0, 20.0]
    for group in record["groups"]:
        for model in group["models"]:
            assert model["gemm_share"] == pytest.approx(model["images_per_s"] * model["macs_computed"] / 100.0)


def test_a_group_is_written_before_the_next_begins(folder, tmp_path, monkeypatch):
    compare = benchmark.compare_throughput

    def stops_at_three(models, images, *more):
        if len(images) == 3:
            raise KeyboardInterrupt
        return compare(models, images, *more)

    monkeypatch.setattr(benchmark, "compare_throughput", stops_at_three)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(options(folder), tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert [group["batch_size"] for group in json.loads(path.read_text())["groups"]] == [1]


def test_a_file_of_other_versions_is_not_added_to(folder, tmp_path):
    path, _ = run_benchmark(options(folder, batch_sizes=["1"], rounds=6, warmup=0), tmp_path)
    record = json.loads(path.read_text())
    record["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was measured on other hardware or with other versions"):
        run_benchmark(options(folder), tmp_path)


def test_no_file_says_whose_machine_it_was(folder, tmp_path):
    path, _ = run_benchmark(options(folder, batch_sizes=["1"], rounds=6, warmup=0), tmp_path)
    text = path.read_text()
    for secret in (socket.gethostname(), os.getcwd(), folder, str(tmp_path), os.path.expanduser("~")):
        assert secret not in text


def test_threads_are_set_and_put_back(folder):
    before = torch.get_num_threads()
    _, record = run_benchmark(options(folder, batch_sizes=["1"], rounds=6, warmup=0, threads=before + 1))
    assert record["hardware"]["threads"] == before + 1 and torch.get_num_threads() == before


def test_the_budget_gives_the_largest_batch(folder, tmp_path, monkeypatch):
    asked = []

    def in_budget(contender, budget, device, dtype, attention, threads):
        asked.append((contender.name, budget, dtype))
        images = 12 if contender.variant_of else 4
        nothing = {"allocated_bytes": None, "reserved_bytes": None}
        return nothing | {"images": images, "peak_bytes": 9, "weights_bytes": 1, "bytes_per_image": 2.0}

    monkeypatch.setattr(benchmark, "images_in_budget", in_budget)
    given = options(folder, removed=[], batch_sizes=["1", "max", "4"], memory_budget="1MB", chunk_size_attention=2)
    _, record = run_benchmark(given, tmp_path)
    assert asked == [(f"tiny-vit {name}", 10**6, "float32") for name in ("stock", "dense", "dense chunked")]
    assert [model["ratio_to_first"] for model in record["memory"][0]["models"]] == [1.0, 1.0, 3.0]
    # The stock model's largest batch is one that was asked for, too.
    assert [group["batch_size"] for group in record["groups"]] == [1, 4]
    run_benchmark(given, tmp_path)
    assert len(asked) == 3


def test_memory_at_every_batch_size(folder, monkeypatch):
    def peak(contender, batch_size, *where):
        return {"peak_bytes": 1000 * batch_size, "allocated_bytes": None, "reserved_bytes": None}

    monkeypatch.setattr(benchmark, "probe", peak)
    _, record = run_benchmark(options(folder, memory=True, rounds=0))
    assert [model["peak_bytes"] for group in record["groups"] for model in group["models"]] == [1000] * 3 + [3000] * 3
    assert "images_per_s" not in record["groups"][0]["models"][0] and "gemm" not in record["groups"][0]


def test_compiled_models_are_one_graph_a_batch_size(folder, monkeypatch):
    """Made anew for every batch size: otherwise the second one would run on a graph for any size."""
    graphs = CompileCounter()
    monkeypatch.setattr(benchmark, "COMPILER", graphs)
    _, record = run_benchmark(options(folder, torch_compile=True, batch_sizes=["2", "3", "5"], rounds=6, warmup=1))
    assert [group["torch_compile"] for group in record["groups"]] == [True] * 3
    # Stock, dense, folded; with fullgraph a second graph would raise.
    assert graphs.frame_count == 3 * 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batch_sizes": ["0"]}, "batch_sizes must be at least 1, or 'max', got '0'"),
        ({"batch_sizes": ["-1"]}, "batch_sizes must be at least 1"),
        ({"batch_sizes": ["8", "many"]}, "batch_sizes must be at least 1, or 'max', got 'many'"),
        ({"batch_sizes": ["max"]}, "'max' is what memory_budget holds: give one"),
        ({"dtypes": ["float8"]}, "dtypes must be among float32, bfloat16, float16, got 'float8'"),
        ({"dtypes": []}, "dtypes must be among"),
        ({"attentions": ["fast"]}, "attention must be among eager, sdpa, flash, got 'fast'"),
        ({"attentions": ["flash"]}, "attention 'flash' computes in bfloat16 and float16 only"),
        ({"attentions": ["flash"], "dtypes": ["bfloat16"]}, "attention 'flash' needs a CUDA device, this one is cpu"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"rounds": 5}, "rounds must be at least 6, or 95 % confidence cannot be had, or 0 to measure no time; got 5"),
        ({"rounds": -1}, "rounds must be at least 6"),
        ({"warmup": -1}, "warmup must be 0 or more, got -1"),
        ({"memory_budget": "ten"}, "memory_budget must be a positive size such as 10GB"),
        ({"memory_budget": "1kB"}, "memory_budget must be larger than the weights: tiny-vit stock in float32 has"),
        ({"models": []}, "model must name at least one model"),
        ({"removed": ["9"]}, "removed must take at least one"),
        ({"device": "tpu"}, "device 'tpu' is not there; found"),
    ],
)
def test_bad_input(folder, more, message):
    with pytest.raises(ValueError, match=message):
        run_benchmark(options(folder, **more))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(folder):
    with pytest.raises(ValueError, match="device 'cuda' is not there; found"):
        run_benchmark(options(folder, device="cuda"))


# The verb


def test_the_verb_prints_tables_and_writes_files(folder, tmp_path, capsys):
    words = [
        "benchmark",
        "--model",
        folder,
        "--removed",
        "0,2",
        "--batch_sizes",
        "1,2",
        "--rounds",
        "6",
        "--device=cpu",
    ]
    assert main([*words, "--output_dir", str(tmp_path / "speed")]) == OK
    said = capsys.readouterr()
    assert "| tiny-vit 0,2 |" in said.out and "multiplies matrices at" in said.out
    assert said.err.splitlines() == ["tiny-vit float32 sdpa: batch 1", "tiny-vit float32 sdpa: batch 2"]
    names = sorted(path.suffix for path in (tmp_path / "speed").iterdir())
    assert names == [".csv", ".json", ".md", ".png"]
    assert main([*words, "--output_dir", str(tmp_path / "speed"), "--json"]) == OK
    again = capsys.readouterr()
    record = json.loads(again.out)
    assert record["schema"] == 1 and len(record["groups"]) == 2 and again.err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch_sizes=0"], "batch_sizes must be at least 1"),
        (["--memory_budget=1kB"], "memory_budget must be larger than the weights"),
        (["--removed=40"], "removed must take"),
    ],
)
def test_bad_input_is_one_line_and_two(folder, words, message, capsys):
    assert main(["benchmark", "--model", folder, "--device=cpu", *words]) == BAD_INPUT
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and said.startswith("hf-nose: ")


def test_the_verb_wants_a_model(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["benchmark"])
    assert ended.value.code == BAD_INPUT and "--model" in capsys.readouterr().err
