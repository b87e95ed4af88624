"""What each of two processes is fed: `torchrun ... two_loaders.py FOLDER`, with data in FOLDER/23 and FOLDER/24."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from recorded_training import images, train  # noqa: E402


EPOCHS = 2
BATCH_SIZE = 4
# The streams of 23 and 24 images: three global batches of eight an epoch.
COUNTS = {"does not divide": 23, "divides": 24}
WORKERS = (0, 2)
KINDS = {"map style": {}, "map style, cropped": {"crop": True}, "stream, cropped": {"streaming": True, "crop": True}}
# A checkpoint is made every second step: in the second epoch after one of its three.
STEPS, STOP = 8, 5


def count_all(folder: Path) -> dict:
    """Two epochs of a stream, for every number of images and of workers."""
    found = {}
    for name, count in COUNTS.items():
        for workers in WORKERS:
            place = folder / f"{count} images, {workers} workers"
            options = {"num_workers": workers, "batch_size": BATCH_SIZE}
            data = images(folder / str(count), streaming=True)
            found[name, workers] = train(place, data, EPOCHS * 3, **options)["batches"]
    return found


def resume_all(folder: Path) -> dict:
    """A training that was never stopped, and the end of one that was stopped in its second epoch."""
    found = {}
    for kind, options in KINDS.items():
        place, data = folder / kind, folder / "23"
        never = train(place / "never", images(data, **options), STEPS)
        train(place / "stopped", images(data, **options), STEPS, STOP)
        for workers in WORKERS:
            # Each goes on from the same checkpoint.
            resumed = train(
                place / "stopped",
                images(data, **options),
                STEPS,
                resume=str(place / "stopped" / "checkpoint-4"),
                num_workers=workers,
                save_strategy="no",
            )
            found[kind, workers] = (never, resumed)
    return found


def accumulate(folder: Path, batch_size: int) -> dict:
    """Ten steps of SGD over batches of `batch_size`, two of them a step."""
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": 2}
    return train(folder / "sgd", images(folder / "24"), 10, optim="sgd", learning_rate=0.05, **sizes)


def refusal(folder: Path) -> str:
    """What is said of 23 images for two batches of 12."""
    try:
        train(folder / "small", images(folder / "23"), 1, batch_size=12)
    except ValueError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    PartialState(cpu=True)
    answer = {"counted": count_all(folder), "resumed": resume_all(folder), "refusal": refusal(folder)}
    answer["accumulated"] = accumulate(folder, batch_size=2)
    torch.save(answer, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
