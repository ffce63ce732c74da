"""What the examples read, and how they split it."""

import gzip
import importlib.util
import pathlib
import tempfile
import unittest

import numpy as np

from tests import example_files

FOLDER = pathlib.Path(__file__).parent.parent / "examples" / "recommendation"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ExamplesDataTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def test_census_columns(self):
        census = load("census_data")
        lines = example_files.census_lines(50)
        path = self.folder / "census.gz"
        with gzip.open(path, "wt") as file:
            file.write("\n".join(lines) + "\n")
        columns, labels = census.read_census(path)
        self.assertEqual(len(columns), 39)
        for dropped in ("marital_status", "instance_weight", "income"):
            self.assertNotIn(dropped, columns)
        cells = np.array([line.split(", ") for line in lines])
        np.testing.assert_array_equal(
            labels["income"], cells[:, 41] == "50000+."
        )
        np.testing.assert_array_equal(
            labels["marital"], cells[:, 7] == "Never married"
        )
        np.testing.assert_array_equal(columns["age"], cells[:, 0].astype(float))
        np.testing.assert_array_equal(columns["year"], cells[:, 40])
        weighted, _ = census.read_census(path, keep_weight=True)
        np.testing.assert_allclose(
            weighted["instance_weight"], cells[:, 24].astype(float)
        )
        path.write_bytes(gzip.compress(b"1, 2, 3\n"))
        with self.assertRaisesRegex(ValueError, "42 values"):
            census.read_census(path)

    def test_census_split(self):
        split = load("census_data").split
        rng = np.random.default_rng(0)
        columns = {
            "a": rng.integers(0, 20, 1000).astype(str),
            "b": rng.integers(0, 10, 1000).astype("float32"),
        }
        rows = np.array(list(zip(columns["a"], columns["b"], strict=True)))
        different = {tuple(row) for row in rows}
        for by_distinct_row in (True, False):
            parts, distinct = split(columns, by_distinct_row)
            self.assertEqual(distinct, len(different))
            together = np.sort(np.concatenate(list(parts.values())))
            np.testing.assert_array_equal(together, np.arange(1000))
            sets = [{tuple(r) for r in rows[part]} for part in parts.values()]
            if by_distinct_row:
                sizes = [len(s) for s in sets]
                self.assertEqual(sum(sizes), distinct)
                np.testing.assert_allclose(
                    np.divide(sizes, distinct), (0.6, 0.2, 0.2), atol=0.01
                )
            else:
                self.assertEqual([*map(len, parts.values())], [600, 200, 200])

    def test_movielens_formats(self):
        """The same ratings, users and films in both formats."""
        movielens = load("movielens_data")
        read = []
        for write in (example_files.write_100k, example_files.write_1m):
            folder = self.folder / write.__name__
            write(folder)
            read.append(movielens.read_movielens(folder))
        for small, large in zip(*read, strict=True):
            self.assertEqual(list(small), list(large))
            for name, values in small.items():
                np.testing.assert_array_equal(values, large[name], name)
        ratings, users, items = read[0]
        first = example_files.RATINGS[0]
        self.assertEqual(users["user_id"][ratings["user"][0]], str(first[0]))
        self.assertEqual(items["item_id"][ratings["item"][0]], str(first[1]))
        self.assertEqual(ratings["rating"][0], first[2])
        self.assertEqual(items["genres"][1], "Action|War")
        np.testing.assert_array_equal(items["year"][:3], [1990, 1991, np.nan])
        with self.assertRaisesRegex(ValueError, "u.data"):
            movielens.read_movielens(self.folder)

    def test_made_up(self):
        made_up = load("movielens_data").made_up
        ratings, users, items = made_up(20, 80, per_user=10)
        self.assertEqual(len(users["age"]), 20)
        self.assertEqual(len(items["genres"]), 80)
        pairs = set(zip(ratings["user"], ratings["item"], strict=True))
        self.assertEqual(len(pairs), 200)  # No film is seen twice.
        self.assertTrue(set(ratings["rating"]) <= {1, 2, 3, 4, 5})
