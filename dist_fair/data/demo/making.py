"""Writing the demo sets: shards of drawn frames, and their indexes."""

import json
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import cv2

from dist_fair import keyed
from dist_fair.data.demo import sets
from dist_fair.data.demo.camera import CAMERAS, encode, expose, optics, setting
from dist_fair.data.demo.manipulations import FAMILIES, WITH_DONOR, Forgery
from dist_fair.data.demo.person import invent
from dist_fair.data.demo.portrait import Portrait
from dist_fair.data.demo.scene import Moment, Picture, Shot, film, moment
from dist_fair.data.demo.sets import FRAMES, SETS, Video
from dist_fair.data.index import INDEX_NAME, write_index
from dist_fair.data.indexing import index_folder
from dist_fair.data.parallel import no_progress, run_jobs
from dist_fair.data.storage import replacing
from dist_fair.data.writing import SHARD_NAME, Sample, write_shard
from dist_fair.errors import DistFairError

# Raised whenever other bytes come out for the same seed and scale.
VERSION = 3
VIDEOS_PER_SHARD = 100
ABOUT = "demo.json"


def make(root: Path, seed: int = 0, scale: float = 1.0, workers: int = 2, progress: bool = True) -> None:
    """Draws the demo sets into ROOT/SET/00000.tar, ... and indexes them; what is already there is kept.

    With the same NumPy and OpenCV the bytes depend on seed and scale alone. `scale` multiplies the number of videos.
    Can be stopped and called again.
    Raises DistFairError if ROOT holds demo sets of other parameters, or something else under their names.
    """
    root = Path(root)
    if not 0 < scale < float("inf"):
        raise DistFairError(f"scale={scale}: a number above 0, 1 for the usual size")
    _claim(root, {"generator": VERSION, "seed": seed, "scale": scale})
    waiting = [name for name in SETS if not (root / name / INDEX_NAME).exists()]
    jobs = []
    for name in waiting:
        (root / name).mkdir(exist_ok=True)
        videos = sets.videos(SETS[name], seed, scale)
        for number, first in enumerate(range(0, len(videos), VIDEOS_PER_SHARD)):
            path = root / name / SHARD_NAME.format(number)
            if not path.exists():
                jobs.append((path, videos[first : first + VIDEOS_PER_SHARD]))
    run_jobs(partial(_write, seed), jobs, workers, _shown if progress else no_progress)
    for name in waiting:
        write_index(index_folder(root / name))


def _shown(done: int, total: int) -> None:
    if total:
        print(f"demo faces: {done} of {total} shards drawn", flush=True)


def frames(video: Video, seed: int) -> Iterator[tuple[Picture, bytes]]:
    """The frames of a video: how each was drawn, and its JPEG bytes."""
    # Scene and camera belong to the real video, compression and forgery to this one.
    key, own = (
        (seed, "demo", video.demo_set, *video.group, video.identity),
        (seed, "demo", video.demo_set, video.number),
    )
    random, scene = keyed.generator(*own, "video"), film(*key)
    use = setting(CAMERAS[video.camera], keyed.generator(*key, "setting"), random)
    strength = float(random.random())
    shot = Shot(_portrait(seed, video.demo_set, video.group, video.identity), scene)
    donor = None
    if video.manipulation in WITH_DONOR:
        donor = Shot(_portrait(seed, video.demo_set, video.group, video.donor), scene)
    for frame in range(FRAMES):
        random = keyed.generator(*own, frame, "photo")
        now = moment(scene, frame)
        picture = shot.picture(now)
        photo = expose(picture.image, use, random)
        if video.manipulation:
            other = _seen(donor, now, use) if donor else None
            photo = FAMILIES[video.manipulation](Forgery(photo, picture, other, strength, random))
        yield picture, encode(photo, use)


def samples(video: Video, seed: int) -> Iterator[Sample]:
    """The frames of a video as a shard's samples."""
    metadata = {
        "label": int(video.manipulation is not None),
        "video": video.name,
        "identity": video.identity_name,
        "attributes": dict(zip(("gender", "race"), video.group, strict=True)),
    }
    if video.manipulation:
        metadata["manipulation"] = video.manipulation
    for frame, (_, data) in enumerate(frames(video, seed)):
        yield Sample(f"{video.name}_{video.manipulation or 'real'}_{frame}", data, "jpg", metadata)


def _write(seed: int, job: tuple[Path, list[Video]]) -> None:
    path, videos = job
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the processes share the cores already
    try:
        write_shard(path, (sample for video in videos for sample in samples(video, seed)))
    finally:
        cv2.setNumThreads(threads)


@lru_cache(maxsize=64)
def _portrait(seed: int, name: str, group: sets.Group, identity: int) -> Portrait:
    return Portrait(invent(*group, seed, "demo", name, *group, identity))


def _seen(donor: Shot, now: Moment, use) -> Picture:
    picture = donor.picture(now)
    return Picture(optics(picture.image, use), picture.face, picture.eyes, picture.mouth)


def _claim(root: Path, about: dict) -> None:
    """Marks ROOT as the home of these demo sets, or finds that it already is."""
    path = root / ABOUT
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = "unreadable text"
        if found != about:
            raise DistFairError(
                f"{path} says the demo sets there were made with {found}, not with {about}: "
                "name another folder, or remove this one to draw them again"
            )
        return
    strange = [name for name in SETS if (root / name).exists()]
    if strange:
        raise DistFairError(
            f"{root / strange[0]} exists but {path} does not, so it is not a demo set: name another folder"
        )
    root.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((json.dumps(about, sort_keys=True) + "\n").encode())
