"""What a configuration file may say beside a ViT's own sizes: types, and no word that leads out of the checkpoint.

This file travels to the Hub beside the weights: it imports nothing but the standard library.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any


MAX_LABELS = 1_000_000
# One entry a block, or a stage, of which there is one more.
MAX_LIST = 1_001
DTYPES = ("float16", "bfloat16", "float32", "float64")
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
# transformers acts on these: it would patch classes, or give blocks sizes that no field of ours tells.
UNSUPPORTED = ("per_layer_config", "fusion_config", "kernel_config", "rope_scaling", "rope_parameters")


def is_flag(value: Any) -> bool:
    """`True` or `False`."""
    return isinstance(value, bool)


def is_version(value: Any) -> bool:
    """A version, such as 0.1.0 or 5.23.0.dev0."""
    return isinstance(value, str) and re.fullmatch(r"[0-9A-Za-z.+!-]{1,64}", value) is not None


def is_dtype(value: Any) -> bool:
    """A floating dtype of torch, or its name: transformers would look any name up in torch."""
    return value in DTYPES if isinstance(value, str) else str(value).removeprefix("torch.") in DTYPES


def is_number_of_labels(value: Any) -> bool:
    """A number of classes for which names can be made."""
    return isinstance(value, int) and not is_flag(value) and 0 <= value <= MAX_LABELS


def is_label_map(value: Any) -> bool:
    """From index to name; JSON makes the index a string."""
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_LABELS
        and all(isinstance(name, str) and re.fullmatch(r"[0-9]{1,9}", str(key)) for key, name in value.items())
    )


def is_index_map(value: Any) -> bool:
    """From name to index."""
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_LABELS
        and all(isinstance(name, str) and re.fullmatch(r"[0-9]{1,9}", str(index)) for name, index in value.items())
    )


def is_problem(value: Any) -> bool:
    """What transformers calls the kind of loss."""
    return isinstance(value, str) and value in PROBLEMS


def is_class_list(value: Any) -> bool:
    """Names of classes."""
    return isinstance(value, list) and all(isinstance(name, str) and name.isidentifier() for name in value)


def is_stage_list(value: Any) -> bool:
    """Names of stages; the backbone's own check says which there are."""
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def is_index_list(value: Any) -> bool:
    """Indices of stages, from the end too."""
    return isinstance(value, list | tuple) and all(isinstance(item, int) and not is_flag(item) for item in value)


def is_local_name(value: Any) -> bool:
    """The name of something in transformers: one with a slash is code to be downloaded."""
    return isinstance(value, str) and re.fullmatch(r"[\w|]{1,64}", value) is not None


def is_weights_file(value: Any) -> bool:
    """A safetensors file beside the configuration."""
    return isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors(\.index\.json)?", value) is not None


def is_auto_map(value: Any) -> bool:
    """Auto class to `module.Class`, in this repository or, after `owner/name--`, in another."""
    if not isinstance(value, Mapping):
        return False
    names = [name for item in value.values() for name in (item if isinstance(item, list | tuple) else [item])]
    pattern = r"([\w-][\w.-]*/[\w-][\w.-]*--)?\w+\.\w+"
    return all(name is None or (isinstance(name, str) and re.fullmatch(pattern, name)) for name in names)


def is_mapping(value: Any) -> bool:
    """A JSON object."""
    return isinstance(value, Mapping)


# transformers' own fields, which it does not check, and those further keys that it acts on. `None` is always allowed.
GIVEN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "output_hidden_states": (is_flag, "true or false"),
    "output_attentions": (is_flag, "true or false"),
    "return_dict": (is_flag, "true or false"),
    "is_encoder_decoder": (is_flag, "true or false"),
    "transformers_version": (is_version, "a version"),
    "hf_nose_version": (is_version, "a version"),
    "dtype": (is_dtype, f"one of {DTYPES}"),
    "torch_dtype": (is_dtype, f"one of {DTYPES}"),
    "num_labels": (is_number_of_labels, f"in [0, {MAX_LABELS}]"),
    "id2label": (is_label_map, f"at most {MAX_LABELS} indices with their names"),
    "label2id": (is_index_map, f"at most {MAX_LABELS} names with their indices"),
    "problem_type": (is_problem, f"one of {PROBLEMS}"),
    "architectures": (is_class_list, "a list of class names"),
    "out_features": (is_stage_list, "a list of stage names"),
    "out_indices": (is_index_list, "a list of stage indices"),
    "attn_implementation": (is_local_name, "one of transformers' own; set others by model.set_attn_implementation"),
    "_attn_implementation": (is_local_name, "one of transformers' own; set others by model.set_attn_implementation"),
    "experts_implementation": (is_local_name, "one of transformers' own"),
    "_experts_implementation": (is_local_name, "one of transformers' own"),
    "transformers_weights": (is_weights_file, "a safetensors file in the checkpoint's folder"),
    "auto_map": (is_auto_map, "Auto classes with module.Class"),
    "quantization_config": (is_mapping, "an object"),
}


def check_lists(values: Mapping[str, Any]) -> None:
    """Refuses lists longer than any model's blocks, before every entry is checked, which takes minutes."""
    for name, value in values.items():
        if isinstance(value, list | tuple) and len(value) > MAX_LIST:
            raise ValueError(f"{name} must be a list of at most {MAX_LIST}, got {len(value)} entries.")


def check_values(cls: type, values: Mapping[str, Any]) -> None:
    """
    Refuses, with a `ValueError` that names the key, `values` of a configuration `cls` that are of a wrong type, that
    lead out of the checkpoint, or that would hide a method. Runs before transformers does anything with them.
    """
    own = {name: value for parent in reversed(cls.__mro__) for name, value in vars(parent).items()}
    for name, value in values.items():
        if name in UNSUPPORTED and value is not None:
            raise ValueError(f"{name} is not supported in a NoseViT's configuration: take it out.")
        if name in GIVEN and value is not None:
            is_fine, meaning = GIVEN[name]
            if not is_fine(value):
                raise ValueError(f"{name} must be {meaning}, got {str(value)[:80]!r}.")
        found = own.get(name)
        is_read_only = isinstance(found, property) and found.fset is None
        if callable(found) or isinstance(found, classmethod | staticmethod) or is_read_only or name[:2] == "__":
            raise ValueError(f"{name} is a name of {cls.__name__}'s own and no key of its configuration: take it out.")
