"""Settings of the whole suite: offline, one thread unless told otherwise, caches in a folder of its own."""

# isort: off
import atexit
import os
import shutil
import tempfile

# Read by the libraries when they are imported, so they stand before any of those imports.
CACHE = tempfile.mkdtemp(prefix="hf_nose_tests_")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = CACHE
os.environ["HF_DATASETS_CACHE"] = os.path.join(CACHE, "datasets")
os.environ["HF_TOKEN"] = "dummy"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# isort: on

import signal  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402


# A shell without job control starts what runs in its background, and all children of that, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# The same examples in every run: a suite that is green today is green tomorrow.
settings.register_profile("hf_nose", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("hf_nose")

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def shared(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"real data are not beside the repository: {name}")
    return path


@pytest.fixture(scope="session")
def deit_tiny() -> Path:
    """Folder of the real DeiT-T, with old key names."""
    return shared("deit-tiny-patch16-224")


@pytest.fixture(scope="session")
def imagenet() -> Path:
    """Folder with 1,000 real ImageNet images in one parquet file."""
    return shared("imagenet-val-1000")


@pytest.fixture(scope="session")
def imagenet_pixels(deit_tiny: Path, imagenet: Path) -> torch.Tensor:
    """Four real images as DeiT-T sees them, (4, 3, 224, 224)."""
    import pyarrow.parquet

    from hf_nose.images import decode_image, load_processor

    rows = next(pyarrow.parquet.ParquetFile(imagenet / "validation.parquet").iter_batches(batch_size=4)).to_pylist()
    return load_processor(deit_tiny)([decode_image(row["image"]) for row in rows], return_tensors="pt").pixel_values


@pytest.fixture(scope="module")
def quick_streams():
    """Streams of shuffled parquet end at once: datasets waits five seconds for Arrow's threads, each time."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield
