"""What each of two processes does: `torchrun ... two_processes_targets.py FOLDER`."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_training import Images, arguments, model, weights  # noqa: E402

from hf_nose.dilution import DilutionCallback  # noqa: E402
from hf_nose.distillation import Distiller  # noqa: E402
from hf_nose.ema import EMA_FILE, ExponentialMovingAverage  # noqa: E402
from hf_nose.training import NoseTrainer  # noqa: E402


STEPS = 10
# Two epochs and a half, so the average is resumed inside an epoch.
IMAGES = 32


def train(folder, batch_size, accumulation, resume=False, average_tokens=False, zero=False):
    """Global batches of eight images, distilled and averaged, whatever the processes and the accumulation."""
    student, teacher = model([1, 2], seed=2).double(), model(seed=1).double()
    if zero:
        for each in (student, teacher):
            torch.nn.init.zeros_(each.classifier.weight)
            torch.nn.init.zeros_(each.classifier.bias)
    options = {"weight": 0.25} if zero else {"weight": 0.5, "features": "both", "blocks": [0, 1, 3]}
    args = arguments(
        folder,
        STEPS,
        save_steps=4,
        eval_steps=STEPS,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.1,
        average_tokens_across_devices=average_tokens,
    )
    trainer = NoseTrainer(
        model=student,
        args=args,
        distiller=Distiller(teacher, **options),
        ema=ExponentialMovingAverage(0.8),
        train_dataset=Images(IMAGES, torch.float64),
        # Whole batches for either rank: the Trainer fills others up with images that count twice.
        eval_dataset=Images(16, torch.float64),
        callbacks=[DilutionCallback("linear", 0.5)],
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8") if resume else None)
    return {
        "world_size": trainer.args.world_size,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "evaluations": [line["eval_ema_loss"] for line in trainer.state.log_history if "eval_ema_loss" in line],
        "weights": weights(student),
        "average": load_file(folder / f"checkpoint-{STEPS}" / EMA_FILE),
    }


def train_all(folder, processes):
    found = {}
    for accumulation in (1, 2):
        sizes = {"batch_size": 8 // processes // accumulation, "accumulation": accumulation}
        place = folder / f"accumulation {accumulation}"
        found[place.name] = train(place, **sizes)
        # An argument that would count the images of all processes.
        found[f"tokens {accumulation}"] = train(folder / f"tokens {accumulation}", **sizes, average_tokens=True)
        found[f"zero {accumulation}"] = train(folder / f"zero {accumulation}", **sizes, zero=True)
    found["resumed"] = train(folder / "accumulation 2", **sizes, resume=True)
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    answer = train_all(folder, processes=2)
    rank = torch.distributed.get_rank()
    torch.save(answer, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
