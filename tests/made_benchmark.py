"""A record of a benchmark that was never run: what it says is made up, so that what is rendered of it is known."""

from hf_nose.files import versions


HARDWARE = {
    "device": "cpu",
    "accelerator": None,
    "processor": "Example 9000",
    "system": "Linux x86_64",
    "cores": 2,
    "threads": 2,
    "float32_precision": "highest",
}


def model(name, rate=None, ratio=(1.0, 1.0, 1.0), batch_size=128, **more):
    """A row of a group; `ratio` is median, lower, upper."""
    chunked = name.endswith(" chunked")
    removed = {"40%": [0, 1, 3, 4, 6], "50%": [0, 1, 3, 4, 6, 9]}.get(name.split()[1], [])
    row = {
        "name": name,
        "kind": "stock" if name.endswith(" stock") else "nose",
        "removed": removed,
        "chunk_size_feed_forward": 788 if chunked else 0,
        "chunk_size_attention": 4 if chunked else 0,
        "fuse_qkv": False,
        "variant_of": name.removesuffix(" chunked") if chunked else None,
        "parameters": 86_567_656 - 2_362_368 * len(removed),
        "macs": 17_582_740_224 - 525_148_416 * len(removed),
        "macs_computed": 17_582_740_224
        - 525_148_416 * len(removed)
        - (0 if name.endswith(" stock") else 1_200_000_000),
    }
    if rate is not None:
        row |= {
            "images_per_s": rate,
            "quartiles": [0.9 * rate, 1.1 * rate],
            "latency_s": batch_size / rate,
            "latency_quartiles": [0.9 * batch_size / rate, 1.1 * batch_size / rate],
            "ratio_to_first": ratio[0],
            "ratio_quartiles": list(ratio[1:]),
            "ratio_interval": list(ratio[1:]),
            "seconds": [batch_size / rate] * 20,
            "verdict": "faster" if ratio[1] > 1 else "not faster: no difference shown",
            "gemm_share": 0.5,
        }
    return row | more


def group(batch_size=128, **more):
    """A group at a batch size, larger batches a little faster."""
    gain = 1 + batch_size / 1000
    sliced = {"ratio_to_plain": 0.98, "plain_interval": [0.96, 1.0]}
    return {
        "shape": "deit-base",
        "dtype": "float32",
        "attention": "eager",
        "torch_compile": False,
        "batch_size": batch_size,
        "rounds": 20,
        "warmup": 3,
        "gemm": {"macs_per_s": 0.25e12, "size": [4096, 768, 3072]},
        "models": [
            model("deit-base stock", 10.0 * gain, batch_size=batch_size),
            model("deit-base dense", 10.1 * gain, (1.01, 0.98, 1.04), batch_size),
            model("deit-base dense chunked", 9.9 * gain, (0.99, 0.97, 1.02), batch_size, **sliced),
            model("deit-base 40%", 13.0 * gain, (1.3, 1.28, 1.32), batch_size),
            model("deit-base 50%", 14.0 * gain, (1.4, 1.38, 1.42), batch_size),
        ],
    } | more


def budget(size=10**10, **more):
    """Images in a budget."""
    rows = []
    for name, images in (("deit-base stock", 600), ("deit-base dense chunked", 2000), ("deit-base 40%", 720)):
        found = {"peak_bytes": 9_900_000_000, "allocated_bytes": None, "reserved_bytes": None}
        found |= {"images": images, "weights_bytes": 346_270_624, "bytes_per_image": 9_553_729_376 / images}
        rows.append(model(name) | found | {"ratio_to_first": images / 600})
    return {"shape": "deit-base", "dtype": "float32", "attention": "sdpa", "budget_bytes": size, "models": rows} | more


def record(groups=None, memory=None, **hardware):
    """The whole record."""
    groups = [group(1), group(8), group(128)] if groups is None else groups
    memory = [budget()] if memory is None else memory
    return {
        "schema": 1,
        "versions": versions(),
        "hardware": HARDWARE | hardware,
        "groups": groups,
        "memory": memory,
    }
