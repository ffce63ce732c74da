"""What the examples read, and how they split it."""

import gzip
import importlib.util
import pathlib
import tempfile
import unittest

import numpy as np

from tests import example_files

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def load(name, folder="recommendation"):
    path = EXAMPLES / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
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

    def test_image_formats(self):
        """The same images in all formats."""
        read = load("image_data", "vision").read
        train = example_files.images(20, (32, 32, 3), seed=0)
        test = example_files.images(10, (32, 32, 3), seed=1)
        grey = {"train": train[0][..., 0], "t10k": test[0][..., 0]}
        grey = {
            part: (x, y[1])
            for (part, x), y in zip(grey.items(), (train, test), strict=True)
        }
        example_files.write_idx(self.folder / "idx", grey, zipped=False)
        example_files.write_idx(self.folder / "gz", grey)
        example_files.write_batches(self.folder / "batches", train, test)
        example_files.write_image_files(
            self.folder / "files.npz", train=train, test=test
        )
        np.savez(
            self.folder / "arrays.npz",
            **dict(zip(("x_train", "y_train"), train, strict=True)),
            **dict(zip(("x_test", "y_test"), test, strict=True)),
        )
        for name in ("idx", "gz", "batches", "files.npz", "arrays.npz"):
            for part, (pixels, labels) in (("train", train), ("test", test)):
                if name == "batches" and part == "train":
                    order = np.concatenate(
                        [np.arange(20)[i::5] for i in range(5)]
                    )
                    pixels, labels = pixels[order], labels[order]
                if name in ("idx", "gz"):
                    pixels = pixels[..., :1]
                found = read(self.folder / name, part)
                np.testing.assert_array_equal(found[0], pixels, name)
                np.testing.assert_array_equal(found[1], labels, name)
        (self.folder / "other").mkdir()
        with self.assertRaisesRegex(ValueError, "data_batch_1"):
            read(self.folder / "other", "train")
        np.savez(self.folder / "wrong.npz", x_train=train[0] / 255, y_train=[1])
        with self.assertRaisesRegex(ValueError, "uint8"):
            read(self.folder / "wrong.npz", "train")
        with self.assertRaisesRegex(ValueError, "test_bytes"):
            read(self.folder / "wrong.npz", "test")

    def test_augmented_images(self):
        augmented = load("image_data", "vision").augmented
        image = np.arange(2 * 5 * 4 * 2).reshape(2, 5, 4, 2)
        images = np.repeat(image, 200, axis=0)
        found = augmented(images, 1, np.random.default_rng(0))
        for first in (0, 200):
            padded = np.pad(images[first], ((1, 1), (1, 1), (0, 0)), "edge")
            expected = {
                padded[down : down + 5, right : right + 4][:, ::step].tobytes()
                for down in range(3)
                for right in range(3)
                for step in (1, -1)
            }
            seen = {x.tobytes() for x in found[first : first + 200]}
            self.assertEqual(seen, expected)
        still = augmented(images, 0, np.random.default_rng(0))
        same = (still == images).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(
            still,
            np.where(same[:, None, None, None], images, images[:, :, ::-1]),
        )
        self.assertLess(150, same.sum())
        self.assertLess(same.sum(), 250)
