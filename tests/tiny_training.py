"""A model and data that train in milliseconds a step, for every test that trains."""

from pathlib import Path

import torch
from transformers import TrainingArguments, ViTConfig

from hf_nose.arguments import training_arguments
from hf_nose.configuration_nose_vit import NoseViTConfig
from hf_nose.modeling_nose_vit import NoseViTForImageClassification
from hf_nose.settings import Settings


NUM_LABELS = 3
NUM_BLOCKS = 4
SETTINGS = {"batch_size": 4, "save_steps": 3, "eval_steps": 4, "logging_steps": 1, "eval_batch_size": 8}


def model(
    diluted=(), compensated=True, drop_path_rate=0.0, seed=0, num_labels=NUM_LABELS
) -> NoseViTForImageClassification:
    torch.manual_seed(seed)
    vit = ViTConfig(
        hidden_size=12,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=num_labels,
        initializer_range=0.2,
    )
    found = NoseViTForImageClassification(NoseViTConfig.from_vit(vit, drop_path_rate=drop_path_rate))
    if diluted:
        found.dilute(diluted, feature_compensation=compensated)
    return found


def zero_logits(num_labels: int = NUM_LABELS) -> NoseViTForImageClassification:
    """A model that finds all classes alike: its loss is the log of their number."""
    found = model(num_labels=num_labels)
    torch.nn.init.zeros_(found.classifier.weight)
    torch.nn.init.zeros_(found.classifier.bias)
    return found


def halves(pixel_values: torch.Tensor, labels: torch.Tensor, **place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for a mixing: soft targets that do not depend on the batch that an image is in."""
    first, second = (torch.nn.functional.one_hot((labels + more) % NUM_LABELS, NUM_LABELS).float() for more in (0, 1))
    return pixel_values, 0.75 * first + 0.25 * second


class Images(torch.utils.data.Dataset):
    """Noise whose mean says the class."""

    def __init__(self, count: int = 22, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(7)
        self.labels = [index % NUM_LABELS for index in range(count)]
        noise = torch.randn(count, 3, 8, 8, generator=generator)
        self.pixel_values = (noise + torch.tensor(self.labels)[:, None, None, None]).to(dtype)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def arguments(folder: Path, steps: int = 8, epochs: float | None = None, **settings) -> TrainingArguments:
    """The arguments that the main job trains with; names that are not the job's go to the Trainer as they are."""
    known = {name: value for name, value in settings.items() if name in Settings.__dataclass_fields__}
    args = training_arguments(Settings(**{**SETTINGS, **known}), folder, steps, epochs, on_cpu=True)
    args.disable_tqdm = True
    for name in settings.keys() - known.keys():
        setattr(args, name, settings[name])
    return args


def weights(trained: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trained.state_dict().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]
