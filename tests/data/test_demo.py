"""The demo faces: same bytes from the same seed, all groups and families, local forgeries, people of their own."""

import hashlib
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from dist_fair import keyed
from dist_fair.data.demo import SETS, make, making, sets
from dist_fair.data.demo.camera import CAMERAS, expose, setting
from dist_fair.data.demo.manipulations import FAMILIES, SEEN, UNSEEN, Forgery
from dist_fair.data.demo.person import GENDERS, RACES, invent
from dist_fair.data.demo.portrait import Portrait
from dist_fair.data.demo.scene import SIZE, Shot, film, moment
from dist_fair.data.index import read_index
from dist_fair.errors import DistFairError

SCALE = 0.02


def small(monkeypatch, *names: str) -> None:
    """Only these sets (by default all), few frames, small shards: a few videos, yet several shards."""
    monkeypatch.setattr(making, "FRAMES", 2)
    monkeypatch.setattr(making, "VIDEOS_PER_SHARD", 9)
    for name in set(SETS) - set(names or SETS):
        monkeypatch.delitem(SETS, name)


def bytes_of(root) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*.*"))}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        make(root, seed=3, scale=SCALE, workers=1, progress=False)
    return root


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_every_group_both_labels_and_its_families(demo, name):
    index = read_index(demo / name)
    assert {a: c.values for a, c in index.attributes.items()} == {"gender": GENDERS, "race": RACES}
    cells = zip(index.attributes["gender"].codes, index.attributes["race"].codes, index.labels, strict=True)
    assert len(set(cells)) == 12
    assert set(index.manipulations.values) <= set(SETS[name].families)
    assert len(index.manipulations.values) >= 3
    assert ((index.manipulations.codes >= 0) == (index.labels == 1)).all()
    assert (index.width == SIZE).all()
    assert (index.height == SIZE).all()
    _, frames = np.unique(index.videos.codes, return_counts=True)
    assert (frames == 2).all()


def test_nobody_is_in_two_sets(demo):
    people = [set(read_index(demo / name).identities.values) for name in SETS]
    assert sum(map(len, people)) == len(set.union(*people))
    keys = {name: (7, "demo", name, "female", "Asian", 0) for name in SETS}
    widths = {invent("female", "Asian", *key).width for key in keys.values()}
    assert len(widths) == len(SETS)


def test_bytes_depend_on_neither_workers_nor_interruptions(demo, tmp_path, monkeypatch):
    small(monkeypatch, "in_domain")
    write, done = making.write_shard, []

    def stopping(path, samples):
        if done:
            raise KeyboardInterrupt
        done.append(path)
        return write(path, samples)

    monkeypatch.setattr(making, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, seed=3, scale=SCALE, workers=1, progress=False)
    kept = done[0].stat().st_mtime_ns
    monkeypatch.setattr(making, "write_shard", write)
    make(tmp_path, seed=3, scale=SCALE, workers=1, progress=False)
    assert done[0].stat().st_mtime_ns == kept
    there = bytes_of(tmp_path)
    assert len(there) == 4  # two shards, index, demo.json
    assert there.items() <= bytes_of(demo).items()


def test_several_workers_write_the_same_bytes(tmp_path, monkeypatch):
    small(monkeypatch, "in_domain")
    monkeypatch.setattr(making, "FRAMES", sets.FRAMES)  # other processes see no patches
    for workers in (1, 2):
        make(tmp_path / str(workers), scale=SCALE, workers=workers, progress=False)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")


def test_a_finished_folder_is_left_alone(demo, monkeypatch):
    small(monkeypatch)
    monkeypatch.setattr(making, "write_shard", None)
    make(demo, seed=3, scale=SCALE, workers=1, progress=False)


@pytest.mark.parametrize("other", [{"seed": 4}, {"scale": 0.5}])
def test_other_parameters_are_an_error(demo, other):
    with pytest.raises(DistFairError, match=r"demo\.json.*another folder"):
        make(demo, **{"seed": 3, "scale": SCALE, **other}, progress=False)


def test_a_folder_of_something_else_is_an_error(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DistFairError, match="train exists"):
        make(tmp_path, progress=False)
    assert not (tmp_path / making.ABOUT).exists()


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_an_error(tmp_path, scale):
    with pytest.raises(DistFairError, match="scale"):
        make(tmp_path, scale=scale, progress=False)


@pytest.fixture(scope="module")
def filmed():
    scene = film(5, "scene")
    scene = replace(scene, rest=replace(scene.rest, pose=replace(scene.rest.pose, yaw=0.1)))
    shots = [Shot(Portrait(invent("female", "White", 5, place)), scene) for place in range(2)]
    target, donor = (shot.picture(moment(scene, 0)) for shot in shots)
    use = setting(CAMERAS["phone"], keyed.generator(1), keyed.generator(2))
    return target, donor, expose(target.image, use, keyed.generator(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forgery_changes_the_face_and_nothing_else(filmed, family):
    target, donor, photo = filmed
    forged = FAMILIES[family](Forgery(photo, target, donor, 0.5, keyed.generator(4)))
    assert forged.shape == photo.shape == (SIZE, SIZE, 3)
    assert forged.dtype == np.float32
    difference = np.abs(forged - photo).max(2)
    assert difference.max() > 0.01
    assert difference[target.face == 0].max() == 0
    assert 0.02 < (difference > 0).mean() < 0.6


def test_a_frame_is_a_picture_of_a_face(filmed):
    target = filmed[0]
    assert target.image.shape == (SIZE, SIZE, 3)
    assert target.image.dtype == np.float32
    assert 0.1 < target.face.mean() < 0.5
    assert (target.eyes <= target.face + 1e-3).all()
    rows = [float((mask.sum(1) * np.arange(SIZE)).sum() / mask.sum()) for mask in (target.eyes, target.mouth)]
    assert rows[0] + 10 < rows[1]


def test_frames_of_a_video_differ_a_little_and_a_fake_shows_its_source():
    videos = sets.videos(SETS["train"], 0, 0.05)
    fake = next(video for video in videos if video.manipulation == "MouthSplice")
    real = next(v for v in videos if (v.group, v.identity, v.manipulation) == (fake.group, fake.identity, None))
    assert fake.donor != fake.identity
    pictures = [
        [cv2.imdecode(np.frombuffer(data, np.uint8), 1) for _, data in making.frames(v, 0)] for v in (real, fake)
    ]
    assert all(image.shape == (SIZE, SIZE, 3) for video in pictures for image in video)
    between_frames = np.abs(pictures[0][0].astype(float) - pictures[0][1]).mean()
    to_source = np.abs(pictures[0][0].astype(float) - pictures[1][0]).mean()
    assert 0 < to_source < 12
    assert 0 < between_frames < 40


def test_training_groups_follow_ffpp():
    videos = sets.videos(SETS["train"], 0, 1.0)
    assert len(videos) == SETS["train"].videos
    counts = {group: sum(video.group == group for video in videos) for group in sets.GROUPS}
    assert counts["female", "White"] > counts["male", "White"] > counts["female", "Asian"] > counts["male", "Asian"]
    for group, count in counts.items():
        fakes = sum(video.group == group and video.manipulation is not None for video in videos)
        assert abs(fakes / count - sets.TRAINING_FAKES[group]) < 0.05
    assert {video.manipulation for video in videos} == {None, *SEEN}
    assert not set(SEEN) & set(UNSEEN)


def test_samples_carry_their_metadata():
    video = sets.videos(SETS["in_domain"], 0, 0.05)[0]
    sample = next(iter(making.samples(video, 0)))
    assert "." not in sample.key
    assert set(sample.metadata) - {"manipulation"} == {"label", "video", "identity", "attributes"}
    assert json.loads(json.dumps(sample.metadata)) == sample.metadata
