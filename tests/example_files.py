"""Small files in the formats that the examples read, made up."""

import gzip
import io
import pickle

import numpy as np

NUM_USERS, NUM_ITEMS = 12, 15
GENRES_100K = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|"
    "Drama|Fantasy|Film-Noir|Horror|Musical|Mystery|Romance|Sci-Fi|Thriller|"
    "War|Western"
).split("|")
# User, item, stars, time: all pairs but every third.
RATINGS = [
    (user, item, 1 + (user * item + item) % 5, 1000 * user + item)
    for user in range(1, NUM_USERS + 1)
    for item in range(1, NUM_ITEMS + 1)
    if (user + item) % 3
]


def _film(item):
    """Year, or `None`, and genres."""
    genres = ["Drama"] if item % 2 else ["Action", "War"]
    return (None if item == 3 else 1989 + item), genres


def _user(user):
    return "FM"[user % 2], 10 * (1 + user % 6), str(user % 4)


def _write(folder, files):
    folder.mkdir()
    for name, lines in files.items():
        text = "\n".join(lines) + "\n"
        (folder / name).write_text(text, encoding="latin-1")


def write_100k(folder):
    users, items = [], []
    for user in range(1, NUM_USERS + 1):
        sex, age, occupation = _user(user)
        users.append(f"{user}|{age}|{sex}|{occupation}|00000")
    for item in range(1, NUM_ITEMS + 1):
        year, genres = _film(item)
        date = f"01-Jan-{year}" if year else ""
        flags = "|".join(str(int(g in genres)) for g in GENRES_100K)
        items.append(f"{item}|Café {item} ({year})|{date}||http://f|{flags}")
    ratings = ["\t".join(map(str, rating)) for rating in RATINGS]
    _write(folder, {"u.data": ratings, "u.user": users, "u.item": items})


def write_1m(folder):
    users, items = [], []
    for user in range(1, NUM_USERS + 1):
        sex, age, occupation = _user(user)
        users.append(f"{user}::{sex}::{age}::{occupation}::00000")
    for item in range(1, NUM_ITEMS + 1):
        year, genres = _film(item)
        items.append(f"{item}::Café {item} ({year})::{'|'.join(genres)}")
    ratings = ["::".join(map(str, rating)) for rating in RATINGS]
    files = {"ratings.dat": ratings, "users.dat": users, "movies.dat": items}
    _write(folder, files)


def census_lines(num_lines, seed=0):
    """Lines with 42 values as the Census-Income (KDD) set has them."""
    rng = np.random.default_rng(seed)
    numbers = (0, 5, 16, 17, 18, 24, 30, 39)
    lines = []
    for _ in range(num_lines):
        cells = [f"value {v}" for v in rng.integers(0, 4, 42)]
        for column in numbers:
            cells[column] = str(rng.integers(0, 90))
        cells[7] = rng.choice(["Never married", "Divorced"])
        cells[41] = rng.choice(["- 50000.", "50000+."])
        lines.append(", ".join(cells))
    return lines


def images(number, shape, seed):
    """Noise with a bright place for each of ten classes, and the labels."""
    labels = np.arange(number) % 10
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (number, *shape)).astype("uint8")
    for image, label in zip(pixels, labels, strict=True):
        top, left = 14 * (label // 5), 5 * (label % 5)
        image[top : top + 14, left : left + 5] += 150
    return pixels, labels.astype("uint8")


def write_idx(folder, parts, zipped=True):
    """The four files of Fashion-MNIST.

    Args:
        folder: Path.
        parts: dict of `"train"` and `"t10k"` to images and labels.
        zipped: bool. Whether they are `.gz`.
    """
    folder.mkdir()
    for part, arrays in parts.items():
        for kind, array in zip(("images", "labels"), arrays, strict=True):
            sizes = np.array(array.shape, ">i4").tobytes()
            data = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
            name = f"{part}-{kind}-idx{array.ndim}-ubyte"
            if zipped:
                name, data = f"{name}.gz", gzip.compress(data)
            (folder / name).write_bytes(data)


def write_batches(folder, train, test):
    """The batches of CIFAR-10 in Python's format."""
    folder.mkdir()
    pixels, labels = train
    batches = {
        f"data_batch_{i + 1}": (pixels[i::5], labels[i::5]) for i in range(5)
    }
    for name, (x, y) in {**batches, "test_batch": test}.items():
        rows = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        batch = {b"data": rows, b"labels": y.tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))


def write_image_files(path, **parts):
    """An `.npz` with PNG files end to end."""
    from PIL import Image

    arrays = {}
    for part, (pixels, labels) in parts.items():
        files = []
        for image in pixels:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            files.append(buffer.getvalue())
        arrays |= {
            f"{part}_bytes": np.frombuffer(b"".join(files), np.uint8),
            f"{part}_offsets": np.cumsum([0, *map(len, files)]),
            f"{part}_labels": labels,
        }
    np.savez(path, **arrays)


def write_mnist(folder, sizes=(120, 50), seed=0):
    """Files in the format of MNIST, of stripes whose place tells the class."""
    rng = np.random.default_rng(seed)
    parts = {}
    for part, number in zip(("train", "t10k"), sizes, strict=True):
        labels = np.arange(number, dtype="uint8") % 10
        images = rng.integers(0, 60, (number, 28, 28), dtype="uint8")
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 4] += 180
        parts[part] = images, labels
    write_idx(folder, parts, zipped=False)
