"""Reads and changes images. There is nothing to run here."""

import gzip
import io
import pathlib
import pickle

import numpy as np

_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_BATCHES = {
    "train": [f"data_batch_{i}" for i in range(1, 6)],
    "test": ["test_batch"],
}


def read(path, part):
    """Images `(N, height, width, channels)` of uint8, and labels `(N,)`.

    Args:
        path: A folder with the four files of Fashion-MNIST (`*-ubyte`, also
            `.gz`) or with the batches of CIFAR-10 in Python's format, which
            you must trust as any pickle; or a `.npz` with the arrays `x_train`,
            `y_train`, `x_test` and `y_test`, or with files of images end to
            end: `train_bytes`, `train_offsets` (where each begins, and the
            end), `train_labels`, and the same of `test`.
        part: `"train"` or `"test"`.
    """
    path = pathlib.Path(path)
    if path.is_file():
        images, labels = _read_npz(path, part)
    elif _idx_file(path, _IDX["train"][0]):
        images, labels = (_read_idx(path, name) for name in _IDX[part])
    elif (path / _BATCHES["train"][0]).is_file():
        batches = [_read_batch(path / name) for name in _BATCHES[part]]
        images, labels = (
            np.concatenate(parts) for parts in zip(*batches, strict=True)
        )
    else:
        raise ValueError(
            f"{str(path)!r} must be a .npz, or have {_IDX['train'][0]}[.gz] or "
            f"{_BATCHES['train'][0]} in it."
        )
    images = images[..., None] if images.ndim == 3 else images
    labels = labels.reshape(-1).astype("int32")
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            "Images must be of uint8 and shape (N, height, width[, channels]). "
            f"Received: {images.dtype}, shape={images.shape}"
        )
    if len(images) != len(labels):
        raise ValueError(
            "There must be a label for each image. Received: "
            f"{len(images)} images, {len(labels)} labels"
        )
    return images, labels


def _read_npz(path, part):
    with np.load(path) as file:
        if f"x_{part}" in file:
            return file[f"x_{part}"], file[f"y_{part}"]
        if f"{part}_bytes" not in file:
            raise ValueError(
                f"{str(path)!r} must have x_{part} or {part}_bytes. "
                f"Received: {', '.join(file)}"
            )
        stream = file[f"{part}_bytes"].tobytes()
        offsets = file[f"{part}_offsets"].tolist()
        labels = file[f"{part}_labels"]
    from PIL import Image  # comes with matplotlib

    files = (stream[a:b] for a, b in zip(offsets, offsets[1:], strict=False))
    images = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    return np.stack(images), labels


def _idx_file(folder, name):
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path


def _read_idx(folder, name):
    path = _idx_file(folder, name)
    if path is None:
        raise ValueError(f"There is no {name} in {str(folder)!r}.")
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    rank = data[3]
    shape = np.frombuffer(data, ">i4", rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _read_batch(path):
    with path.open("rb") as file:
        batch = pickle.load(file, encoding="bytes")
    images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.array(batch[b"labels"])


def augmented(images, shift, rng):
    """Half of the images mirrored, each moved by some pixels.

    Args:
        images: `(N, height, width, channels)`.
        shift: int. Pixels that an image is moved at most, in each direction;
            what comes in from outside is as the nearest pixel of the edge.
        rng: A NumPy generator.
    """
    number, height, width, _ = images.shape
    mirrored = rng.random(number) < 0.5
    down, right = rng.integers(-shift, shift + 1, (2, number, 1))
    rows = np.clip(np.arange(height) + down, 0, height - 1)
    columns = np.clip(np.arange(width) + right, 0, width - 1)
    columns = np.where(mirrored[:, None], columns[:, ::-1], columns)
    which = np.arange(number)[:, None, None]
    return images[which, rows[:, :, None], columns[:, None, :]]
