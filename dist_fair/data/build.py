"""Building shards from a folder of images and a table: same input, same bytes; stopped anywhere, it goes on."""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dist_fair import keyed
from dist_fair.data.index import INDEX_NAME, Index, read_index, write_index
from dist_fair.data.indexing import index_folder
from dist_fair.data.layouts import layout_of
from dist_fair.data.parallel import Progress, no_progress, run_jobs
from dist_fair.data.storage import replacing
from dist_fair.data.tables import Entry, TableOptions
from dist_fair.data.writing import IMAGE_EXTENSIONS, SHARD_NAME, Sample, write_shard
from dist_fair.errors import DistFairError

MANIFEST = "build.json"
MANIFEST_FORMAT = 1
LISTED = 10  # missing files named in an error


@dataclass(frozen=True)
class Item:
    """One sample to be: key, path under the images' folder, and the JSON of its metadata."""

    key: str
    path: str
    metadata: str
    split: str


@dataclass(frozen=True)
class ShardJob:
    """One shard to be: OUT and its path there, the images' folder and what to take from it."""

    out: Path
    path: str
    images: Path
    items: tuple[Item, ...]

    @property
    def file(self) -> Path:
        """Where the shard lies."""
        return self.out / self.path

    def inputs(self) -> str:
        """A digest of everything the shard's bytes depend on; of each image, size and time stand for its content."""
        digest = hashlib.blake2b(digest_size=16)
        for item in self.items:
            status = (self.images / item.path).stat()
            row = [item.key, item.path, item.metadata, status.st_size, status.st_mtime_ns]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


def build(
    tables: Sequence[str | Path],
    images: str | Path,
    out: str | Path,
    *,
    layout: str = "plain",
    options: TableOptions | None = None,
    samples_per_shard: int = 1000,
    shuffle: bool = True,
    seed: int = 0,
    name: str | None = None,
    overwrite: bool = False,
    workers: int = 1,
    progress: Progress = no_progress,
) -> list[Index]:
    """Builds OUT/00000.tar, ... (OUT/SPLIT/00000.tar, ... if the table has splits), indexes them, returns the indexes.

    Image bytes are stored as they are. With `shuffle`, samples are ordered by a digest of (seed, key), so that shards
    are mixed and the order of the table's rows does not matter; without, they keep the table's order. A shard that is
    finished and whose inputs are unchanged is not built again. All input is checked before anything is written: raises
    DistFairError for an empty table, a missing column or file, a label other than 0 and 1, a path that comes twice, an
    image that is not jpg, png or webp, and an OUT that another table, or another program, has filled.
    """
    if samples_per_shard < 1:
        raise DistFairError(f"samples_per_shard={samples_per_shard}: give at least 1")
    options = options or TableOptions()
    _check_pattern(options.video_pattern)
    entries = layout_of(layout)([Path(table) for table in tables], options)
    images, out = Path(images).absolute(), Path(out).absolute()
    items = _items(entries, images)
    if shuffle:
        items.sort(key=lambda item: keyed.digest(seed, "shards", item.key))
    jobs = _jobs(items, images, out, samples_per_shard)
    folders = {job.file.parent: job.items[0].split for job in jobs}
    _write(jobs, _manifest(jobs, folders, out, overwrite), workers, progress)
    base = name or out.name
    names = {folder: f"{base}-{split}" if split else base for folder, split in folders.items()}
    return [_indexed(folder, name, workers, progress) for folder, name in names.items()]


@dataclass
class Manifest:
    """OUT/build.json: the plan's digest and, for each finished shard, the digest of its inputs and its size."""

    file: Path
    plan: str
    shards: dict[str, dict[str, str | int] | None]

    @classmethod
    def read(cls, out: Path) -> "Manifest":
        """The manifest of an output folder, empty where there is none."""
        file = out / MANIFEST
        if not file.is_file():
            return cls(file, "", {})
        try:
            found = json.loads(file.read_text())
            if found["format"] != MANIFEST_FORMAT:
                raise ValueError(f"format {found['format']}, this version reads {MANIFEST_FORMAT}")
            return cls(file, found["plan"], dict(found["shards"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DistFairError(
                f"{file} cannot be used ({error}): remove {out}, or build into another folder"
            ) from error

    def write(self) -> None:
        """Replaces the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as file:
            text = json.dumps({"format": MANIFEST_FORMAT, "plan": self.plan, "shards": self.shards}, indent=1)
            file.write(text.encode())

    def has(self, job: ShardJob) -> bool:
        """Whether a shard is finished, still there and made from the inputs as they are now."""
        entry = self.shards.get(job.path)
        if entry is None or not job.file.is_file():
            return False
        return entry == {"inputs": job.inputs(), "size": job.file.stat().st_size}


def build_shard(job: ShardJob) -> tuple[str, dict[str, str | int]]:
    """Writes one shard; returns its path and its entry for the manifest."""
    inputs = job.inputs()
    write_shard(job.file, (_sample(job.images / item.path, item) for item in job.items))
    return job.path, {"inputs": inputs, "size": job.file.stat().st_size}


def _sample(file: Path, item: Item) -> Sample:
    extension = file.suffix[1:].lower()
    try:
        image = file.read_bytes()
    except OSError as error:
        raise DistFairError(f"{file} cannot be read: {error.strerror}; then start the same build again") from error
    return Sample(item.key, image, "jpg" if extension == "jpeg" else extension, json.loads(item.metadata))


def _write(jobs: Sequence[ShardJob], manifest: Manifest, workers: int, progress: Progress) -> None:
    missing = [job for job in jobs if not manifest.has(job)]
    if not missing:
        return
    for folder in {job.file.parent for job in missing}:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX_NAME).unlink(missing_ok=True)  # an index of the old shards must not outlive them
    manifest.shards |= {job.path: None for job in missing}
    manifest.write()

    def finished(result: tuple[str, dict[str, str | int]]) -> None:
        path, entry = result
        manifest.shards[path] = entry
        manifest.write()

    done = len(jobs) - len(missing)
    run_jobs(build_shard, missing, workers, lambda count, _: progress(done + count, len(jobs)), finished)


def _manifest(jobs: Sequence[ShardJob], folders: Iterable[Path], out: Path, overwrite: bool) -> Manifest:
    """The manifest to go on with. Overwriting removes the shards of another plan."""
    manifest, plan = Manifest.read(out), _plan_digest(jobs)
    for path in sorted(path for folder in folders for path in folder.glob("*.tar")):
        if path.relative_to(out).as_posix() not in manifest.shards:
            raise DistFairError(f"{path} was not built here: move it away, or build into another folder")
    if manifest.plan not in ("", plan):
        if not overwrite:
            raise DistFairError(
                f"{out} holds shards of another table or other settings: build into another folder, or replace them "
                "with --overwrite"
            )
        for path in manifest.shards:
            (out / path).unlink(missing_ok=True)
            (out / path).with_name(INDEX_NAME).unlink(missing_ok=True)
        manifest.shards = {}
    manifest.plan = plan
    return manifest


def _indexed(folder: Path, name: str, workers: int, progress: Progress) -> Index:
    if (folder / INDEX_NAME).is_file():
        index = read_index(folder)
        if index.names == (name,):
            return index
    index = index_folder(folder, name=name, workers=workers, progress=progress)
    write_index(index, ["--name", name])
    return index


def _items(entries: Sequence[Entry], images: Path) -> list[Item]:
    if not entries:
        raise DistFairError("the table has no row: nothing to build")
    _check_entries(entries, images)
    keys = _keys([entry.path for entry in entries])
    return [
        Item(key, entry.path, json.dumps(entry.record.metadata(), sort_keys=True), entry.split or "")
        for key, entry in zip(keys, entries, strict=True)
    ]


def _check_entries(entries: Sequence[Entry], images: Path) -> None:
    places: dict[str, str] = {}
    missing = []
    for entry in entries:
        if (other := places.setdefault(entry.path, entry.place)) != entry.place:
            raise DistFairError(f"{entry.place}: path '{entry.path}' was there already, at {other}; each image once")
        suffix = PurePosixPath(entry.path).suffix
        if suffix[1:].lower() not in IMAGE_EXTENSIONS:
            raise DistFairError(f"{entry.place}: '{entry.path}' is not .jpg, .png or .webp; convert it first")
        if entry.split is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", entry.split):
            raise DistFairError(f"{entry.place}: split '{entry.split}' is to be a folder: use letters, digits, . _ -")
        if not (images / entry.path).is_file():
            missing.append(f"{entry.path} ({entry.place})")
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        listed = ", ".join(missing[:LISTED])
        raise DistFairError(f"{len(missing)} of {len(entries)} images are not in {images}: {listed}{more}")


def _keys(paths: Sequence[str]) -> list[str]:
    """Unique keys without dots and slashes; paths that fall together get a digest of the path appended."""
    plain = [str(PurePosixPath(path).with_suffix("")).replace("/", "__").replace(".", "_") for path in paths]
    counts = Counter(plain)
    keys = [
        key if counts[key] == 1 else f"{key}-{hashlib.blake2b(path.encode(), digest_size=6).hexdigest()}"
        for key, path in zip(plain, paths, strict=True)
    ]
    if len(set(keys)) != len(keys):
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise DistFairError(f"two images get the key '{twice}': rename one")
    return keys


def _jobs(items: Sequence[Item], images: Path, out: Path, samples_per_shard: int) -> list[ShardJob]:
    splits: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        splits[item.split].append(item)
    return [
        ShardJob(out, str(PurePosixPath(split) / SHARD_NAME.format(number)), images, tuple(part))
        for split in sorted(splits)
        for number, part in enumerate(_parts(splits[split], samples_per_shard))
    ]


def _parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Parts of equal length (within one), none longer than `size`."""
    count = math.ceil(len(items) / size)
    for number in range(count):
        yield items[len(items) * number // count : len(items) * (number + 1) // count]


def _plan_digest(jobs: Sequence[ShardJob]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for job in jobs:
        rows = [[item.key, item.path, item.metadata] for item in job.items]
        digest.update(json.dumps([job.path, rows]).encode())
    return digest.hexdigest()


def _check_pattern(pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise DistFairError(f"the video pattern '{pattern}' is no regular expression: {error}") from error
