"""What is rendered of a benchmark's record: CSV, tables, "not faster" in words, the paper's columns apart."""

import csv
import io
import re

import pytest
from made_benchmark import budget, group, model, record

from hf_nose.benchmark_tables import groups_csv, memory_csv, paper_figures, tables, write_tables
from hf_nose.profiling import hardware_slug


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def cells(text, name):
    """The cells of the first row of a table that begins with this name."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_csv_holds_everything_that_a_number_depends_on():
    rows = rows_of(groups_csv(record()))
    assert len(rows) == 15
    row = rows[-2]
    wanted = {
        "shape": "deit-base",
        "name": "deit-base 40%",
        "removed": "0 1 3 4 6",
        "dtype": "float32",
        "attention": "eager",
        "torch_compile": "False",
        "batch_size": "128",
        "rounds": "20",
        "ratio_to_first": "1.3",
        "ratio_interval_lower": "1.28",
        "ratio_interval_upper": "1.32",
        "verdict": "faster",
        "processor": "Example 9000",
        "threads": "2",
        "accelerator": "",
        "ratio_to_plain": "",
        "peak_bytes": "",
    }
    assert {name: row[name] for name in wanted} == wanted
    assert row["torch"] and row["transformers"] and row["hf_nose"] and row["python"]
    assert rows[2]["plain_interval_lower"] == "0.96" and rows[2]["chunk_size_feed_forward"] == "788"


def test_csv_of_memory():
    rows = rows_of(memory_csv(record()))
    assert [(row["name"], row["images"], row["budget_bytes"]) for row in rows][1] == (
        "deit-base dense chunked",
        "2000",
        "10000000000",
    )
    assert rows[1]["ratio_to_first"] == str(2000 / 600) and rows[1]["allocated_bytes"] == ""


def test_not_faster_is_said_in_words():
    text = tables(record())
    assert "deit-base dense is not faster than deit-base stock: 1.01x, 0.98 to 1.04 with 95 % confidence." in text
    assert "deit-base 40% is" not in text
    assert cells(text, "deit-base dense")[7] == "not faster: no difference shown"
    assert cells(text, "deit-base 40%")[6:8] == ["1.30 (1.28 to 1.32)", "faster"]
    assert cells(text, "deit-base stock")[7] == ""


def test_slower_is_said_in_words_too():
    slow = model("deit-base dense", 8.0, (0.8, 0.75, 0.85)) | {"verdict": "not faster: slower"}
    text = tables(record([group(models=[model("deit-base stock", 10.0), slow])], []))
    assert "deit-base dense is not faster than deit-base stock: 0.80x, 0.75 to 0.85" in text
    assert cells(text, "deit-base dense")[7] == "not faster: slower"


def test_the_roofline_and_the_cost_of_slices_stand_under_the_table():
    text = tables(record([group(16)], []))
    rate = "multiplies matrices at 0.25 T MAC/s (the best that was measured, at 4096 x 768 x 3072; beside these models"
    assert f"{rate} 0.25)." in text
    better = group(1, gemm={"macs_per_s": 0.5e12, "size": [1, 2, 3]})
    assert "at 0.5 T MAC/s (the best that was measured, at 1 x 2 x 3; beside these models 0.25)." in tables(
        record([group(16), better, group(8, dtype="bfloat16", gemm={"macs_per_s": 9e12, "size": [1, 1, 1]})], [])
    )
    # 1 / 0.98 - 1, and the ends of the interval change places.
    assert (
        "deit-base dense chunked takes 2.0 % more time than deit-base dense: +0.0 to +4.2 % with 95 % confidence, 20"
        in text
    )
    assert cells(text, "deit-base 50%")[8] == "50 %"


def test_the_title_says_what_runs_a_second_time():
    plain = [model("deit-base stock", 10.0), model("deit-base dense", 10.1)]
    sliced, fused = model("deit-base dense chunked", 9.9), model("deit-base dense fused", 9.9, fuse_qkv=True)
    start = "**deit-base, float32, eager, batch 16"
    for more, end in (
        ([], ""),
        ([sliced], ", whole and in slices"),
        ([fused], ", q, k and v apart and as one product"),
    ):
        title = tables(record([group(16, models=plain + more)], [])).splitlines()[0]
        assert title == f"{start}{end}**"


def test_the_paper_s_figures_stand_in_columns_of_their_own():
    text = tables(record([group(128)], []))
    header = next(line for line in text.splitlines() if line.startswith("| model |"))
    assert "| paper: images/s | paper: x dense |" in header
    assert cells(text, "deit-base stock")[-2:] == ["299", "1.00"]
    assert cells(text, "deit-base 40%")[-2:] == ["390", "1.30"]
    assert cells(text, "deit-base 50%")[-2:] == ["408", "1.36"]
    for name in ("deit-base dense", "deit-base dense chunked"):
        assert cells(text, name)[-2:] == ["", ""]
    assert "V100-32GB batch 128, another machine" in text


@pytest.mark.parametrize(
    "more",
    [
        {"batch_size": 256},
        {"dtype": "bfloat16"},
        {"attention": "sdpa"},
        {"torch_compile": True},
        {"shape": "my-vit"},
    ],
)
def test_where_the_setting_is_not_the_paper_s_its_figures_are_absent(more):
    assert "paper" not in tables(record([group() | more], []))


@pytest.mark.parametrize(
    ("name", "more", "is_its"),
    [
        ("deit-base 40%", {}, True),
        ("deit-base-patch16-224 40%", {}, True),
        # Of the same shape, and not DeiT; of DeiT, and another set; one's own.
        ("vit-base-patch16-224 40%", {}, False),
        ("deit-base 7,8,9,10,11", {"removed": [7, 8, 9, 10, 11]}, False),
        ("deit-base mine", {"kind": "checkpoint", "removed": [0, 1, 3, 4, 6]}, False),
        ("deit-base 40% chunked", {"removed": [0, 1, 3, 4, 6]}, False),
    ],
)
def test_only_the_papers_models_get_its_figures(name, more, is_its):
    figures = paper_figures("deit-base", model(name, **more))
    assert figures.get("top1") == (81.8 if is_its else None)
    # Its set is not published.
    assert paper_figures("deit-small", model("deit-small 40%", removed=[0, 1, 2, 3, 4]))["top1"] > 70
    assert paper_figures("my-vit", model("my-vit stock")) == {}


def test_images_in_the_paper_s_budget():
    for more in ({"attention": "sdpa"}, {"dtype": "bfloat16", "attention": "eager"}):
        assert "paper" not in tables(record([], [budget() | more]))
    text = tables(record([], [budget(attention="eager")]))
    assert "images in 9537 MiB" in text
    assert cells(text, "deit-base stock") == ["deit-base stock", "600", "1.00", "330", "15550", "606", "1.00"]
    assert cells(text, "deit-base dense chunked")[1:3] == ["2000", "3.33"]
    assert cells(text, "deit-base dense chunked")[-2:] == ["", ""]
    assert cells(text, "deit-base 40%")[-2:] == ["730", "1.20"]
    assert "paper" not in tables(record([], [budget(2**30, attention="eager")]))


def test_a_model_of_which_nothing_fits():
    rows = [
        model("deit-base stock")
        | {"images": 0, "ratio_to_first": None, "weights_bytes": 2**20, "bytes_per_image": None}
    ]
    assert cells(tables(record([], [budget(2**21, models=rows)])), "deit-base stock")[1:] == ["0", "", "1", ""]


def test_memory_at_a_batch_size_without_times():
    peaks = {"peak_bytes": 500 * 2**20, "allocated_bytes": 400 * 2**20, "reserved_bytes": 500 * 2**20}
    entry = group(models=[model("deit-base stock", **peaks)], rounds=0)
    del entry["gemm"]
    text = tables(record([entry], []))
    assert cells(text, "deit-base stock")[-3:] == ["500", "400", "500"] and "images/s" not in text


def test_every_number_of_a_table_is_rounded_from_the_record():
    """No figure without a source: what the rows show is in the record or in the paper."""
    made, shown = record([group(128)], []), tables(record([group(128)], []))
    known = set()
    for row in made["groups"][0]["models"]:
        for key, scale, form in (
            ("parameters", 1e-6, ".2f"),
            ("macs", 1e-9, ".2f"),
            ("macs_computed", 1e-9, ".2f"),
            ("latency_s", 1e3, ".0f"),
            ("images_per_s", 1, ".3g"),
            ("ratio_to_first", 1, ".2f"),
            ("gemm_share", 100, ".0f"),
        ):
            known.add(f"{scale * row[key]:{form}}")
        known |= {f"{value:.3g}" for value in row["quartiles"]} | {f"{value:.2f}" for value in row["ratio_interval"]}
    known |= {"299", "390", "408", "1.00", "1.30", "1.36"}
    body = [line for line in shown.splitlines() if line.startswith("| deit-base")]
    figures = re.findall(r"\d+\.?\d*", " ".join("|".join(line.split("|")[2:]) for line in body))
    assert len(figures) > 40 and set(figures) <= known


def test_files_beside_the_record(tmp_path):
    path = tmp_path / "example.json"
    write_tables(record(), path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["example-memory.csv", "example.csv", "example.md"]
    assert (tmp_path / "example.md").read_text() == tables(record())
    write_tables(record(memory=[]), path)
    assert not (tmp_path / "example-memory.csv").exists()


def test_names_of_files():
    assert hardware_slug(record()["hardware"]) == "example-9000-2-threads"
    gpu = record(device="cuda", accelerator="NVIDIA H100 80GB HBM3")["hardware"]
    assert hardware_slug(gpu) == "nvidia-h100-80gb-hbm3"


def test_nothing_measured():
    assert tables(record([], [])) == "Nothing was measured.\n"
