"""The configurations for `accelerate launch` say what accelerate and our model understand."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from hf_nose import NoseViTForImageClassification
from hf_nose.block_nose_vit import NoseViTLayer


FOLDER = Path(__file__).resolve().parent.parent / "scripts" / "accelerate"


@pytest.mark.parametrize("name, kind", [("ddp", DistributedType.MULTI_GPU), ("fsdp", DistributedType.FSDP)])
def test_accelerate_reads_it(name, kind):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_processes == 8
    # Precision is the settings' affair: `--bf16`.
    assert config.mixed_precision == "no"


def test_blocks_are_what_is_sharded():
    config = load_config_from_file(str(FOLDER / "fsdp.yaml")).fsdp_config
    assert config["fsdp_transformer_layer_cls_to_wrap"] == NoseViTLayer.__name__
    assert NoseViTLayer.__name__ in NoseViTForImageClassification._no_split_modules
    assert FullyShardedDataParallelPlugin(fsdp_version=config["fsdp_version"]).fsdp_version == 2
