"""Has a run begun to learn? A loss that stays where a constant prediction would put it says no."""

from collections.abc import Mapping
from statistics import fmean

from dist_fair.reporting.progress import say

SUFFIX = "_at_chance"
FEWEST_STEPS = 75  # the demo's ERM, from scratch, leaves chance between its steps 30 and 70
MARGIN = 0.995  # of the loss at chance, means of at least 37 steps: a detector of AUC 0.56 is below


class ChanceWatch:
    """Warns when a loss has not left chance after a tenth of the run (at least 75 steps), and when it ends there.

    An observer of the training loop: called after each step with the step's number, from 0, and its values. It looks at
    each term `loss/X` beside which there is a measure `X_at_chance`. steps: of the whole run; shorter ones than 75
    steps are not judged. A resumed run is judged on the steps it is told of.
    """

    def __init__(self, steps: int):
        self.steps, self.first = steps, max(steps // 10, FEWEST_STEPS)
        self.seen: dict[str, list[tuple[float, float]]] = {}

    def __call__(self, step: int, values: Mapping[str, object]) -> None:
        for name, chance in values.items():
            if name.endswith(SUFFIX) and chance is not None:
                loss = values[f"loss/{name.removesuffix(SUFFIX)}"]
                self.seen.setdefault(name, []).append((loss, chance))
        if self.steps >= FEWEST_STEPS and step + 1 in (self.first, self.steps):
            for name, pairs in self.seen.items():
                self._judge(step + 1, name.removesuffix(SUFFIX), pairs[-self.first // 2 :])

    def _judge(self, step: int, term: str, pairs: list[tuple[float, float]]) -> None:
        loss, chance = (fmean(column) for column in zip(*pairs, strict=True))
        if loss >= MARGIN * chance:
            say(f"warning: after {step} of {self.steps} steps the loss/{term} is {loss:.4g}, and a constant prediction "
                f"would have {chance:.4g}: nothing has been learned. A higher optimizer.lr, pretrained weights "
                "(detector.pretrained, or detector.init_from an ERM run), or a later and slower start of the other "
                "terms (their delay and ramp) may help")  # fmt: skip
