"""What an evaluation writes down: one score a sample, with the label and the attributes it is judged by."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_fair.demographics import UNKNOWN, Groups
from dist_fair.errors import DistFairError, nearest

FIXED_COLUMNS = ("sample_id", "video", "label", "score")


@dataclass(frozen=True)
class Predictions:
    """The scores of one dataset, every sample once.

    sample_id: (N,) str, unique; video: (N,) str, unique over manipulations ("FaceSwap/000_003");
    label: (N,) int64, 0 real, 1 fake; score: (N,) float64, higher is more fake, usually P(fake) in [0, 1];
    attributes: (N,) str each, "unknown" where unknown.

    Raises DistFairError for columns of different lengths, no samples, repeated sample ids, labels outside {0, 1},
    non-finite scores, and videos that hold both real and fake samples.
    """

    sample_id: np.ndarray
    video: np.ndarray
    label: np.ndarray
    score: np.ndarray
    attributes: Mapping[str, np.ndarray]

    def __post_init__(self):
        text = {"sample_id": self.sample_id, "video": self.video}
        columns = {name: np.asarray(values, dtype=str) for name, values in text.items()}
        columns |= {"label": np.asarray(self.label), "score": np.asarray(self.score, dtype=np.float64)}
        attributes = {name: np.asarray(values, dtype=str) for name, values in self.attributes.items()}
        _check(columns, attributes)
        columns["label"] = columns["label"].astype(np.int64)
        for name, values in (columns | {"attributes": attributes}).items():
            object.__setattr__(self, name, values)
        _check_videos(self.video, self.label)

    def __len__(self) -> int:
        return len(self.sample_id)

    @classmethod
    def read(cls, path: str | Path) -> "Predictions":
        """The predictions of a file that `write` wrote; every further column is an attribute.

        Raises DistFairError, naming the file, where it is missing, not Parquet, or lacks a column.
        """
        import pyarrow
        import pyarrow.parquet

        try:
            # Not through the datasets API, which would take folder names such as "seed=1" for columns.
            table = pyarrow.parquet.ParquetFile(path).read()
        except (OSError, pyarrow.ArrowException) as error:
            raise DistFairError(f"{path}: no predictions can be read ({error}); run the evaluation again") from error
        missing = [name for name in FIXED_COLUMNS if name not in table.column_names]
        if missing:
            raise DistFairError(f"{path}: the columns {missing} are missing; run the evaluation again")
        numbers = {name: table[name].to_numpy() for name in ("label", "score")}
        names = [name for name in table.column_names if name not in numbers]
        text = {name: [UNKNOWN if value is None else str(value) for value in table[name].to_pylist()] for name in names}
        try:
            return cls(text.pop("sample_id"), text.pop("video"), **numbers, attributes=text)
        except DistFairError as error:
            raise DistFairError(f"{path}: {error}") from error

    def write(self, path: str | Path) -> None:
        """Parquet with the columns sample_id, video, label, one per attribute, score, in the order of the samples.

        Written aside, synced and renamed: a file under `path` is always whole.
        """
        import pyarrow
        import pyarrow.parquet

        columns = {
            "sample_id": pyarrow.array(self.sample_id.tolist(), pyarrow.string()),
            "video": pyarrow.array(self.video.tolist(), pyarrow.string()),
            "label": pyarrow.array(self.label, pyarrow.int8()),
            **{name: pyarrow.array(values.tolist(), pyarrow.string()) for name, values in self.attributes.items()},
            "score": pyarrow.array(self.score, pyarrow.float64()),
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial")
        try:
            with aside.open("wb") as file:
                pyarrow.parquet.write_table(pyarrow.table(columns), file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def vocabulary(self, attributes: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
        """The values of each attribute to be judged: those declared, or, for an empty list, all found, sorted.

        Raises DistFairError for an attribute that the predictions lack.
        """
        for name in attributes:
            if name not in self.attributes:
                known = nearest(name, [*self.attributes])
                raise DistFairError(f"attribute '{name}' is not in the predictions: {known}")
        return {name: tuple(values) or self._found(name) for name, values in attributes.items()}

    def codes(self, groups: Groups) -> np.ndarray:
        """Group of each sample, (N,) int64; -1 where an attribute is unknown or not among the declared values."""
        columns = {}
        for name, values in zip(groups.attributes, groups.values, strict=True):
            columns[name] = np.full(len(self), -1)
            for code, value in enumerate(values):
                columns[name][self.attributes[name] == value] = code
        return groups.codes(columns)

    def _found(self, name: str) -> tuple[str, ...]:
        return tuple(str(value) for value in np.unique(self.attributes[name]) if value != UNKNOWN)


def _check(columns: Mapping[str, np.ndarray], attributes: Mapping[str, np.ndarray]) -> None:
    lengths = {name: len(values) for name, values in {**columns, **attributes}.items()}
    taken = [name for name in attributes if name in FIXED_COLUMNS]
    if taken:
        raise DistFairError(f"attribute '{taken[0]}' has the name of a column of the predictions: rename the attribute")
    if len(set(lengths.values())) > 1:
        raise DistFairError(f"columns of different lengths: {lengths}")
    if not lengths["sample_id"]:
        raise DistFairError("no samples: nothing can be evaluated")
    ids, counts = np.unique(columns["sample_id"], return_counts=True)
    if len(ids) < lengths["sample_id"]:
        raise DistFairError(f"sample '{ids[counts > 1][0]}' is there {counts.max()} times: every sample counts once")
    for name, wrong in (
        ("label", ~np.isin(columns["label"], (0, 1))),
        ("score", ~np.isfinite(columns["score"])),
    ):
        if wrong.any():
            place = f"sample '{columns['sample_id'][wrong][0]}', {wrong.sum()} in all"
            wanted = "0 (real) or 1 (fake)" if name == "label" else "a finite number"
            raise DistFairError(f"{name} {columns[name][wrong][0]} ({place}): must be {wanted}")


def _check_videos(video: np.ndarray, label: np.ndarray) -> None:
    mixed = np.intersect1d(video[label == 0], video[label == 1])
    if len(mixed):
        raise DistFairError(
            f"video '{mixed[0]}' has real and fake samples ({len(mixed)} such videos): "
            "name videos with their manipulation, as in 'FaceSwap/000_003'"
        )
