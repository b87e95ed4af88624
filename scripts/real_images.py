"""What the scripts that measure a model on real images share: their options, and what a record says of both."""

import argparse
from pathlib import Path

from hf_nose.records import public_id


def measurement_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all of them take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of a ViT")
    parser.add_argument("--dataset", required=True, help="images, see hf-nose run")
    parser.add_argument("--base_model_id", help="public name of the model")
    parser.add_argument("--dataset_id", help="public name of the data set")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    return parser


def measured_on(options: argparse.Namespace) -> dict[str, str]:
    """How a record calls the model and the data set: never by a path."""
    return {
        "model": public_id(options.model, options.base_model_id),
        "dataset": public_id(options.dataset, options.dataset_id),
    }
