"""Reads MovieLens, or makes up data like it. There is nothing to run."""

import pathlib

import numpy as np

GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)


def read_movielens(folder):
    """The ratings of ml-100k or ml-1m.

    Args:
        folder: The unpacked folder, with `u.data`, `u.user` and `u.item`, or
            with `ratings.dat`, `users.dat` and `movies.dat`.

    Returns:
        Three dicts of arrays. Ratings: `user` and `item` (rows of the others),
        `rating` and `time`. Users: `user_id`, `age`, `sex` and `occupation`,
        strings. Items: `item_id`, `genres` (`"War|Drama"`) and `year`, NaN
        where it is not known.
    """
    folder = pathlib.Path(folder)
    if (folder / "u.data").exists():
        ratings = _lines(folder / "u.data", "\t", 4)
        users = _lines(folder / "u.user", "|", 5)
        items = _lines(folder / "u.item", "|", 5 + len(GENRES))
        names = [line[0] for line in items]
        # The date is as in 01-Jan-1995.
        years = [line[2][-4:] for line in items]
        genres = [
            "|".join(
                g for g, on in zip(GENRES, line[5:], strict=True) if on == "1"
            )
            for line in items
        ]
        # In years; in the other format they are ranges already.
        ages = [str(int(line[1]) // 10 * 10) for line in users]
        sexes = [line[2] for line in users]
    elif (folder / "ratings.dat").exists():
        ratings = _lines(folder / "ratings.dat", "::", 4)
        users = _lines(folder / "users.dat", "::", 5)
        items = _lines(folder / "movies.dat", "::", 3)
        names = [line[0] for line in items]
        # The title ends as in Toy Story (1995).
        years = [line[1][-5:-1] for line in items]
        genres = [line[2] for line in items]
        ages = [line[2] for line in users]
        sexes = [line[1] for line in users]
    else:
        raise ValueError("neither u.data nor ratings.dat is in the folder")
    users = {
        "user_id": np.array([line[0] for line in users]),
        "age": np.array(ages),
        "sex": np.array(sexes),
        "occupation": np.array([line[3] for line in users]),
    }
    years = [float(y) if y.isdigit() else np.nan for y in years]
    items = {
        "item_id": np.array(names),
        "genres": np.array(genres),
        "year": np.array(years, "float32"),
    }
    user_rows = {name: row for row, name in enumerate(users["user_id"])}
    item_rows = {name: row for row, name in enumerate(names)}
    ratings = {
        "user": np.array([user_rows[line[0]] for line in ratings]),
        "item": np.array([item_rows[line[1]] for line in ratings]),
        "rating": np.array([line[2] for line in ratings], "float32"),
        "time": np.array([int(line[3]) for line in ratings]),
    }
    return ratings, users, items


def _lines(path, separator, width):
    text = path.read_text(encoding="latin-1")
    lines = [line.split(separator) for line in text.split("\n") if line]
    if not lines or any(len(line) != width for line in lines):
        raise ValueError(f"a line of {path.name} must have {width} values")
    return lines


def made_up(num_users=1000, num_items=1500, per_user=50, seed=0):
    """Ratings as `read_movielens` gives them, of people who do not exist.

    Which films people see depends on how well known these are and on one part
    of a person's and a film's hidden vectors, how they like them on another.
    Both parts have to do with age, occupation, genres and year.
    """
    rng = np.random.default_rng(seed)
    per_user = min(per_user, num_items // 3)
    age, sex = rng.integers(1, 7, num_users), rng.integers(0, 2, num_users)
    occupation = rng.integers(0, 15, num_users)
    has_genre = rng.random((num_items, len(GENRES) - 1)) < 0.12
    has_genre[np.arange(num_items), rng.integers(0, 18, num_items)] = True
    year = rng.integers(1950, 2000, num_items)

    def hidden(width):
        """Vectors of users and of items, from features and by chance."""
        user = rng.normal(size=(7, width))[age]
        user += rng.normal(size=(2, width))[sex]
        user += rng.normal(size=(15, width))[occupation]
        item = has_genre @ rng.normal(size=(18, width))
        item += np.outer((year - 1975) / 15, rng.normal(size=width))
        user = user / user.std() + rng.normal(size=user.shape)
        item = item / item.std() + rng.normal(size=item.shape)
        return (user @ item.T) / (2 * width**0.5)

    known = rng.normal(size=num_items)
    # The largest of scores with Gumbel noise are a draw without replacement.
    chance = rng.gumbel(size=(num_users, num_items))
    seen = np.argsort(-(2 * hidden(6) + known + chance))[:, :per_user]
    likes = hidden(6) + 0.3 * known + 0.5 * rng.normal(size=(1, num_items))
    liking = np.take_along_axis(likes, seen, 1).ravel()
    stars = 3.5 + liking + 0.4 * rng.normal(size=liking.size)
    ratings = {
        "user": np.repeat(np.arange(num_users), per_user),
        "item": seen.ravel(),
        "rating": np.clip(np.round(stars), 1, 5).astype("float32"),
        "time": rng.permutation(seen.size),
    }
    users = {
        "user_id": np.arange(num_users).astype(str),
        "age": np.array([f"{value}0" for value in age]),
        "sex": np.array(["F", "M"])[sex],
        "occupation": occupation.astype(str),
    }
    genres = ["|".join(np.array(GENRES[1:])[row]) for row in has_genre]
    items = {
        "item_id": np.arange(num_items).astype(str),
        "genres": np.array(genres),
        "year": year.astype("float32"),
    }
    return ratings, users, items


def features_of(users, items, user, item):
    """The columns of a model for pairs of rows of users and of items."""
    return {
        **{name: values[user] for name, values in users.items()},
        **{name: values[item] for name, values in items.items()},
    }
