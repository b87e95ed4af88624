"""What each of two processes does: `torchrun ... two_processes.py FOLDER [--without_use_cpu]`."""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from tiny_training import Images, arguments, halves, model, weights, zero_logits  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from hf_nose.arguments import images_per_step  # noqa: E402
from hf_nose.dilution import DilutionCallback  # noqa: E402
from hf_nose.mixing import Mixing  # noqa: E402
from hf_nose.modeling_nose_vit import nose_vit  # noqa: E402
from hf_nose.training import NoseTrainer  # noqa: E402


STEPS = 12
# 12 x 0.5: M is 0 from the sixth step on, so the last seven train without the diluted attention.
DECAY = 0.5
CLASSES = 700


class Masks(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.values.append(nose_vit(model).mask_values())


def train(folder, found, dtype=torch.float32, mixing=None, **settings):
    """Global batches of eight images, whatever the number of processes."""
    masks = Masks()
    diluted = nose_vit(found).config.diluted_attention_layers
    trainer = NoseTrainer(
        model=found,
        args=arguments(folder, STEPS, save_steps=STEPS, eval_steps=STEPS, **settings),
        train_dataset=Images(24, dtype),
        eval_dataset=Images(6, dtype),
        mixing=mixing,
        callbacks=[*([DilutionCallback("linear", DECAY)] if diluted else []), masks],
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "world_size": trainer.args.world_size,
        "images_per_step": images_per_step(trainer.args),
        "checkpointing": nose_vit(found).is_activation_checkpointing,
        "masks": masks.values,
        "losses": losses,
        "weights": weights(found),
    }


def train_all(folder, batch_size):
    found = {}
    for checkpointing in (False, True):
        options = {"batch_size": batch_size, "gradient_checkpointing": checkpointing}
        found[f"checkpointing {checkpointing}"] = train(folder / str(checkpointing), model([1, 2]), **options)
    exact = {"batch_size": batch_size, "optim": "sgd", "learning_rate": 0.1}
    found["float64"] = train(folder / "float64", model([1, 2]).double(), torch.float64, **exact)
    for accumulation in (1, 2):
        sizes = {"batch_size": batch_size // accumulation, "gradient_accumulation_steps": accumulation}
        soft = {"optim": "sgd", "learning_rate": 0.1, "mixing": halves, **sizes}
        place = folder / f"accumulation {accumulation}"
        found[f"soft {accumulation}"] = train(place / "soft", model([1, 2]).double(), torch.float64, **soft)
        # At a learning rate of next to nothing, so that every step sees logits of 0.
        still = {"learning_rate": 1e-12, "min_learning_rate": 1e-12, **sizes}
        # The Trainer's own default, which the loss has to bear.
        still["average_tokens_across_devices"] = True
        for name, mixing in (("mixed", Mixing(CLASSES, mixup=0.8, cutmix=1.0)), ("class ids", None)):
            options = {"mixing": mixing, **still}
            found[f"zero logits {name} {accumulation}"] = train(place / name, zero_logits(CLASSES), **options)
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if "--without_use_cpu" in sys.argv:
        args = arguments(folder)
        args = type(args)(**{**json.loads(args.to_json_string()), "use_cpu": False, "output_dir": str(folder)})
        NoseTrainer(model=model([1]), args=args, train_dataset=Images())
        sys.exit("two processes that never met would have been trained")
    answer = train_all(folder, batch_size=4)
    rank = torch.distributed.get_rank()
    torch.save(answer, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
