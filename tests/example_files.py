"""Small files in the formats that the examples read, made up."""

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


def write_mnist(folder, sizes=(120, 50), seed=0):
    """Files in the format of MNIST, of stripes whose place tells the class."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for part, number in zip(("train", "t10k"), sizes, strict=True):
        labels = np.arange(number, dtype="uint8") % 10
        images = rng.integers(0, 60, (number, 28, 28), dtype="uint8")
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 4] += 180
        for kind, array in (("images", images), ("labels", labels)):
            name = f"{part}-{kind}-idx{array.ndim}-ubyte"
            head = bytes((0, 0, 8, array.ndim))
            head += np.array(array.shape, ">i4").tobytes()
            (folder / name).write_bytes(head + array.tobytes())
