"""The rate of matrix products, on a simulated clock and on this machine."""

import torch

from hf_nose.roofline import gemm_rate, update_shares


CPU = torch.device("cpu")


def test_the_best_size_by_its_median_the_first_run_not_counted():
    # Two sizes of 1,000 and 8,000 MACs, four runs each.
    seconds = iter([9.0, 1.0, 2.0, 4.0, 9.0, 8.0, 4.0, 3.0])
    watch = lambda call: next(seconds)  # noqa: E731
    sizes = [(10, 10, 10), (20, 20, 20)]
    assert gemm_rate(CPU, torch.float32, sizes, repeats=3, watch=watch) == {"macs_per_s": 2000.0, "size": [20, 20, 20]}


def test_what_is_timed_is_the_product():
    shapes = []

    def watch(call):
        shapes.append(tuple(call().shape))
        return 1.0

    found = gemm_rate(CPU, torch.bfloat16, [(6, 5, 7)], repeats=1, watch=watch)
    assert shapes == [(6, 7)] * 2 and found == {"macs_per_s": 210.0, "size": [6, 5, 7]}


def test_on_this_machine():
    found = gemm_rate(CPU, torch.float32, [(256, 256, 256)], repeats=3)
    assert 1e8 < found["macs_per_s"] < 1e15


def entry(dtype, images_per_s, macs_per_s):
    models = [{"images_per_s": images_per_s, "macs_computed": 17_000_000_000}]
    return {"dtype": dtype, "gemm": {"macs_per_s": macs_per_s, "size": [1, 1, 1]}, "models": models}


def test_shares_are_of_the_best_rate_of_the_data_type():
    groups = [entry("float32", 20.0, 680e9), entry("float32", 10.0, 340e9), entry("bfloat16", 40.0, 1360e9)]
    groups.append({"dtype": "float32", "models": [{"peak_bytes": 1}]})
    update_shares(groups)
    assert [group["models"][0].get("gemm_share") for group in groups] == [0.5, 0.25, 0.5, None]
