"""Evaluation: every sample of every data set exactly once, on any number of ranks.

Who holds what: each rank scores its slice of each global batch; the scores (one fp32 a sample) are gathered in rank
order, which is canonical order; the padding of the last batch is cut off. A sum of hashes of the samples that were
really read, all-reduced, must be the hash of "each once". Metrics are computed from the gathered predictions, never
averaged over ranks; rank 0 writes.
"""

import json
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.data.hashing import consumed_hash, expected_hash
from dist_fair.data.index import Column, Index
from dist_fair.demographics import UNKNOWN
from dist_fair.engine.module import TrainingModule
from dist_fair.engine.run_folder import RunFolder, write_text
from dist_fair.errors import DistFairError, on_all_ranks
from dist_fair.metrics.evaluation import evaluate
from dist_fair.metrics.predictions import Predictions

Load = Callable[[Index], Iterable[Batch]]


def score(
    module: TrainingModule,
    index: Index,
    batches: Iterable[Batch],
    observe: Callable[[int], None],
) -> Predictions:
    """Predictions of one data set, on every rank; unreadable samples, if the policy lets them pass, are not among them.

    observe: called after each global batch with its number of samples, padding left out.
    """
    comm, gathered, consumed, rows = module.comm, [], 0, 0
    training = module.training
    module.eval()
    for batch in batches:
        columns = torch.stack([module.score(batch), batch.valid.float()], dim=1)
        gathered.append(comm.gather(columns, "evaluation/scores", batch.sizes).cpu())
        consumed += consumed_hash(batch.samples.cpu().numpy())
        observe(min(sum(batch.sizes), len(index) - rows))
        rows += sum(batch.sizes)
    module.train(training)
    _check_exactly_once(consumed, index, comm)
    scores, valid = torch.cat(gathered)[: len(index)].double().numpy().T
    return _predictions(index, scores, np.flatnonzero(valid))


def _predictions(index: Index, scores: np.ndarray, rows: np.ndarray) -> Predictions:
    if len(broken := rows[~np.isfinite(scores[rows])]):
        place = index.place(int(broken[0]))
        raise DistFairError(f"{len(broken)} scores are not finite, the first for {place}: the weights are broken")
    return Predictions(
        sample_id=index.keys[rows].astype(str),
        video=named(index.videos)[rows],
        label=index.labels[rows].astype(np.int64),
        score=scores[rows],
        attributes={name: named(column)[rows] for name, column in index.attributes.items()},
    )


def evaluate_all(
    module: TrainingModule,
    indexes: Mapping[str, Index],
    load: Load,
    folder: RunFolder,
    *,
    bootstrap: int,
    seed: int,
    source: Mapping[str, str],
    observe: Callable[[int], None],
) -> dict[str, dict]:
    """Scores and judges each data set; rank 0 writes predictions/NAME.parquet and evaluation.json.

    evaluation.json keeps what it has of other data sets. source: whose numbers these are, told in each report:
    {"checkpoint": its name, "recipe": fingerprint}. observe: as for `score`. Returns the report of each data set on
    rank 0, {} elsewhere.
    """
    comm, reports = module.comm, {}
    for name, index in indexes.items():
        with on_all_ranks():
            found = score(module, index, load(index), observe)
        if comm.rank == 0:
            found.write(folder.predictions(name))
            values = {attribute: column.values for attribute, column in index.attributes.items()}
            extra = {**source, "unreadable": len(index) - len(found)}
            reports[name] = extra | evaluate(found, values, bootstrap, seed)
        comm.barrier("evaluation")
    if comm.rank == 0:
        write_text(folder.evaluation, json.dumps(folder.reports() | reports, indent=1, allow_nan=False) + "\n")
    return reports


def named(column: Column) -> np.ndarray:
    """A column's strings, (N,), "unknown" where there is none."""
    return np.array([*column.values, UNKNOWN], dtype=str)[column.codes]


def _check_exactly_once(consumed: int, index: Index, comm: Communicator) -> None:
    """Raises DistFairError, on every rank, unless the ranks together read each sample exactly once."""
    consumed = (consumed + 2**63) % 2**64 - 2**63
    total = comm.sum(torch.tensor([consumed], dtype=torch.int64, device=comm.device), "evaluation/hash").item()
    if total != expected_hash(len(index)):
        raise DistFairError(
            f"evaluation of {', '.join(index.folders)} did not read each of its {len(index)} samples once"
        )
