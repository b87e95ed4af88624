"""What each of two processes does with a sharded model: `torchrun ... two_shards.py FOLDER`."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from tiny_training import Images, model  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from hf_nose.modeling_nose_vit import nose_vit  # noqa: E402
from hf_nose.processes import whole_weights  # noqa: E402
from hf_nose.schedules import scheduled_masks  # noqa: E402


STEPS, PER_RANK = 10, 4


def train(found, rank, world_size):
    """Ten steps of SGD while M falls to 0; each rank takes its share of the same global batches."""
    images = Images(STEPS * PER_RANK * 2)
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
    per_rank = 2 * PER_RANK // world_size
    for step in range(STEPS):
        nose_vit(found).set_mask(scheduled_masks("linear", 0.5, "step", step, STEPS)[0])
        first = step * 2 * PER_RANK + rank * per_rank
        rows = [images[index] for index in range(first, first + per_rank)]
        pixel_values = torch.stack([row["pixel_values"] for row in rows])
        loss = found(pixel_values, labels=torch.tensor([int(row["labels"]) for row in rows])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def shard(found):
    """As scripts/accelerate/fsdp.yaml says: every block, then the rest."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in nose_vit(found).blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(found, mesh=mesh)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    answer = {}
    for compensation in (False, True):
        made = model([])
        made.dilute([1, 2], feature_compensation=compensation)
        sharded = train(shard(made), rank, world_size)
        is_sharded = sum(isinstance(parameter, DTensor) for parameter in sharded.parameters())
        whole = whole_weights(sharded)
        if rank == 0:
            # As a job does behind its training.
            sharded.save_pretrained(Path(sys.argv[1]) / f"saved-{compensation}", state_dict=dict(whole))
        answer[compensation] = {
            "weights": whole,
            "sharded": is_sharded,
            "local": sum(parameter.to_local().numel() for parameter in sharded.parameters()),
        }
    torch.save(answer, Path(sys.argv[1]) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
