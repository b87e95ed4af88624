"""Top-k accuracy, also over two processes."""

import math
import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from transformers import ViTConfig, ViTForImageClassification

from hf_nose.metrics import TopKAccuracy, evaluate_model, top5_ids


NUM_LABELS = 7


def make_model(num_labels: int = NUM_LABELS) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=num_labels, initializer_range=0.5,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def make_batches(sizes: tuple[int, ...] = (4, 4, 4, 4, 3)) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(size, 3, 8, 8, generator=generator),
            "labels": torch.randint(0, NUM_LABELS, (size,), generator=generator),
        }
        for size in sizes
    ]


def by_hand(model: torch.nn.Module, batches: list[dict]) -> dict:
    pixel_values = torch.cat([batch["pixel_values"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    with torch.no_grad():
        logits = model(pixel_values).logits
    ranks = [sorted(range(len(row)), key=lambda i: -row[i]).index(label) for row, label in zip(logits, labels)]  # noqa: B905
    return {
        "top1": sum(rank < 1 for rank in ranks) / len(ranks),
        "top5": sum(rank < 5 for rank in ranks) / len(ranks),
        "loss": float(F.cross_entropy(logits, labels)),
        "num_images": len(ranks),
    }


def test_metric_from_top_five_ids():
    predictions = np.array([[3, 1, 2, 0, 4], [1, 3, 2, 0, 4], [9, 8, 7, 6, 5], [0, 1, 2, 5, 3]])
    result = TopKAccuracy(keep_in_memory=True).compute(predictions=predictions, references=np.array([3, 3, 3, 3]))
    assert result == {"top1": 0.25, "top5": 0.75}
    assert all(type(value) is float for value in result.values())


def test_metric_from_single_ids_has_no_top_five():
    metric = TopKAccuracy(keep_in_memory=True)
    assert metric.compute(predictions=[1, 2, 3], references=[1, 2, 0]) == {"top1": 2 / 3}


def test_metric_is_fed_in_batches_and_used_again(tmp_path):
    metric = TopKAccuracy(cache_dir=str(tmp_path))
    for _ in range(2):
        metric.add_batch(predictions=torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]), references=torch.tensor([0, 0]))
        metric.add_batch(predictions=torch.tensor([[1, 2, 3, 4, 5]]), references=torch.tensor([0]))
        metric.add(prediction=[1, 2, 3, 4, 0], reference=0)
        assert metric.compute() == {"top1": 0.25, "top5": 0.75}


def test_metric_combines():
    both = evaluate.combine({"ours": TopKAccuracy(keep_in_memory=True), "again": TopKAccuracy(keep_in_memory=True)})
    result = both.compute(predictions=[[0, 1, 2, 3, 4], [1, 0, 2, 3, 4]], references=[0, 0])
    assert result == {"ours_top1": 0.5, "ours_top5": 1.0, "again_top1": 0.5, "again_top5": 1.0}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[1, 2, 3]], [1], r"must have shape \(images,\) or \(images, 5\), got \(1, 3\)"),
        ([[1, 0, -1, -1, -1]], [-1], "`references` must be 0 or more, got -1"),
        ([1, 2], [1], "Mismatch in the number of predictions"),
    ],
)
def test_metric_refuses(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        TopKAccuracy(keep_in_memory=True).compute(predictions=predictions, references=references)


def test_top_five_ids_in_order_with_ties_to_the_lower_id():
    logits = torch.tensor([[0.0, 5.0, 1.0, 4.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0, 2.0]])
    assert top5_ids(logits).tolist() == [[1, 3, 5, 4, 2], [5, 0, 1, 2, 3]]
    assert top5_ids(torch.zeros(64, 1000)).tolist() == [[0, 1, 2, 3, 4]] * 64  # many ties: an unstable sort mixes them
    assert top5_ids(logits, torch.tensor([0, 0])).tolist() == top5_ids(logits).tolist()


def test_top_five_ids_of_few_classes_are_filled_up():
    ids = top5_ids(torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 2.0]]))
    assert ids.tolist() == [[1, 2, 0, -1, -1], [0, 2, 1, -1, -1]]
    assert ids.dtype == torch.int64
    assert TopKAccuracy(keep_in_memory=True).compute(predictions=ids, references=[2, 0]) == {"top1": 0.5, "top5": 1.0}


@pytest.mark.parametrize("as_iterator", [False, True])
def test_model_is_evaluated_image_by_image(as_iterator):
    model, batches = make_model(), make_batches()
    result = evaluate_model(model, iter(batches) if as_iterator else batches, "cpu")
    expected = by_hand(model, batches)
    assert 0 < expected["top1"] < expected["top5"] < 1
    assert {key: result[key] for key in ("top1", "top5", "num_images")} == {
        key: expected[key] for key in ("top1", "top5", "num_images")
    }
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_metric_and_evaluation_agree():
    model, batches = make_model(), make_batches()
    metric = TopKAccuracy(keep_in_memory=True)
    with torch.no_grad():
        for batch in batches:
            ids = top5_ids(model(batch["pixel_values"]).logits)
            metric.add_batch(predictions=ids, references=batch["labels"])
    result = evaluate_model(model, batches, "cpu")
    assert metric.compute() == {"top1": result["top1"], "top5": result["top5"]}


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_training_mode_comes_back(training):
    torch.manual_seed(0)
    model = make_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train(training)
    first = evaluate_model(model, make_batches(), "cpu")
    assert model.training is training
    assert evaluate_model(model, make_batches(), "cpu") == first == evaluate_model(model.eval(), make_batches(), "cpu")


def test_half_precision_model_gets_half_precision_images():
    result = evaluate_model(make_model().to(torch.bfloat16), make_batches(), "cpu")
    assert result["num_images"] == 19 and math.isfinite(result["loss"])


def test_logits_that_are_not_finite_stop_with_the_batch_and_restore_the_mode():
    model, batches = make_model().train(), make_batches()
    batches[2]["pixel_values"][1, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite in evaluation batch 2"):
        evaluate_model(model, batches, "cpu")
    assert model.training


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="`batches` holds no images"):
        evaluate_model(make_model(), [], "cpu")


def _evaluate_on_each_rank(folder: str) -> None:
    state = PartialState(cpu=True)  # without `cpu`, accelerate leaves two CPU processes apart and says nothing
    assert state.num_processes == 2
    rank = state.process_index
    model = make_model()
    for name, batches in (("uneven", make_batches()), ("fewer", make_batches((3,)))):
        for kind, given in (("list", batches), ("stream", iter(batches))):
            torch.save(evaluate_model(model, given, "cpu"), f"{folder}/{name}-{kind}-{rank}.pt")
    broken = make_batches()
    broken[1]["pixel_values"][0] = math.inf  # a batch of rank 1
    try:
        evaluate_model(model, broken, "cpu")
    except FloatingPointError as error:
        torch.save(str(error), f"{folder}/broken-{rank}.pt")
    state.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """Three batches to one rank and two to the other, the last one smaller; and fewer batches than ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, __file__, str(tmp_path)], env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    model = make_model()
    for name, batches in (("uneven", make_batches()), ("fewer", make_batches((3,)))):
        expected = evaluate_model(model, batches, "cpu")
        for kind in ("list", "stream"):
            for rank in range(2):
                assert torch.load(tmp_path / f"{name}-{kind}-{rank}.pt") == expected
    for rank in range(2):
        assert "not finite in evaluation batch 1" in torch.load(tmp_path / f"broken-{rank}.pt")


if __name__ == "__main__":
    _evaluate_on_each_rank(sys.argv[1])
