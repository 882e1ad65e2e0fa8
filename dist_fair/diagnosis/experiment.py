"""Checks of a recipe: does it resolve, can every rank read its data, does it fit these ranks?"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dist_fair.diagnosis.site import Site
from dist_fair.diagnosis.verdict import Verdict, ok, problem, warning
from dist_fair.errors import DistFairError


def recipe(site: Site) -> Verdict:
    """The recipe and its overrides."""
    if site.fault is not None:
        return problem("recipe", site.fault, alike=True)
    if site.resolved is None:
        return ok("recipe", "none named, so none was looked at: dist-fair doctor recipe=NAME key=value ...", alike=True)
    chosen, short = site.resolved.recipe, site.resolved.fingerprint()[:12]
    return ok("recipe", f"{chosen.recipe} resolves, out={chosen.out}, fingerprint {short}", alike=True)


def data_sets(site: Site) -> list[Verdict] | None:
    """Index and shards of each data set as this rank sees them, and one sample decoded, another one on each rank."""
    return [*_data_sets(site)] if site.resolved else None


def _data_sets(site: Site) -> Iterator[Verdict]:
    from dist_fair.data.staging import fingerprint
    from dist_fair.engine.assembly import dataset_folder

    data = site.resolved.recipe.data
    for entry in dict.fromkeys((*data.train, *data.eval)):
        name, folder = f"data {entry}", dataset_folder(data, entry)
        if undrawn(site):
            yield ok(name, f"{folder}: not drawn yet, training draws it", alike=True)
            continue
        try:
            index, bad = _probe(site, folder)
        except (DistFairError, OSError) as error:
            yield problem(name, str(error), alike=True)
            continue
        size = sum(shard.size for shard in index.shards)
        found = (f"{folder}: {len(index):,} samples in {len(index.shards)} shards, {size / 1e9:.3g} GB, "
                 f"{fingerprint(index.shards)}")  # fmt: skip
        if bad:
            yield warning(name, f"{found}; a bad sample: {bad[0].reason}", "dist-fair shards inspect --verify")
        else:
            yield ok(name, f"{found}; a sample decoded on each rank", alike=True)


def lanes(site: Site) -> Verdict | None:
    """Does the number of ranks divide the lanes?"""
    if site.resolved is None:
        return None
    from dist_fair.engine.assembly import training_index, training_plan

    chosen, world = site.resolved.recipe, site.ranks.world
    if undrawn(site):
        return None
    plan = training_plan(chosen, training_index(chosen))
    plan.owned(site.ranks.rank, world)
    found = f"{plan.lanes} lanes, {chosen.train.batch_size} samples a step on {world} rank(s)"
    if chosen.train.ranks not in (None, world):
        return warning("lanes", found, f"train.ranks={chosen.train.ranks} stops such a run: launch so many", alike=True)
    return ok("lanes", found, alike=True)


def stage_to(site: Site) -> Verdict | None:
    """Is the local disk named on this rank, and large enough?"""
    if site.resolved is None or site.resolved.recipe.data.stage_to is None:
        return None
    from dist_fair.data.index import read_index
    from dist_fair.data.node_copy import NodeCopy
    from dist_fair.data.staging import local_folder, shard_folders
    from dist_fair.engine.assembly import dataset_folder

    data = site.resolved.recipe.data
    root = local_folder(data.stage_to)
    place = next(path for path in (root, *root.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        return problem("data.stage_to", f"{root}: {place} cannot be written", "name a local folder that is yours")
    folders = {dataset_folder(data, entry) for entry in (*data.train, *data.eval)}
    indexes = [read_index(folder) for folder in sorted(folders) if not undrawn(site)]
    copy = NodeCopy(root, shard_folders(root, indexes, [None] * len(indexes)))
    copy.check_space()
    return ok("data.stage_to", f"{root}: {copy.total / 1e9:.3g} GB are still to be copied, and fit")


def _probe(site: Site, folder: Path) -> tuple:
    """The index of a data set, and what was bad about one sample of it."""
    from dist_fair.data.index import read_index
    from dist_fair.data.reading import Reader

    data, index = site.resolved.recipe.data, read_index(folder)
    row = np.array([site.ranks.rank * len(index) // site.ranks.world])
    reader = Reader(index, data.image_size, data.bad_samples, data.max_pixels)
    return index, reader.read(row, np.zeros_like(row), replace=False).bad


def undrawn(site: Site) -> bool:
    """Are these the demo faces, before the first training?"""
    from dist_fair.data.index import INDEX_NAME

    data = site.resolved.recipe.data
    return data.name == "demo" and not any(Path(data.root).glob(f"*/{INDEX_NAME}"))
