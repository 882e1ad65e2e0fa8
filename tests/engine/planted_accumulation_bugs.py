"""Bugs to plant in exact accumulation: each is a context in which `accumulation_worlds.step`, on one rank, has it."""

from dataclasses import replace
from unittest.mock import patch

import torch

from dist_fair.data.window import Window
from dist_fair.engine import module
from dist_fair.engine.loop import Trainer
from tests.engine import accumulation_worlds as worlds


def by_micro_batch():
    """Rows in the order in which they were read."""

    def as_read(plan, count, world):
        return torch.arange(count * plan.batch_size // world)

    return patch.object(worlds, "canonical_order", as_read)


def one_by_one():
    """Plain accumulation: an objective for each micro-batch."""
    return patch.object(Trainer, "_windows", lambda self, batches: [Window([batch]) for batch in batches])


def labels_as_read():
    """Outputs in canonical order, and labels and groups in another."""

    def merged(self):
        return arranged(self if self.order is None else replace(self, order=torch.arange(len(self.order))))

    arranged = Window.merged
    return patch.object(Window, "merged", merged)


def without_gradient():
    """The first pass has no graph, and nobody hands the second one the gradients of its outputs."""

    def constant(self, columns):
        return arranged(self, [column.detach() for column in columns])

    arranged = Window.arranged
    return patch.object(Window, "arranged", constant)


def divided_twice():
    """The joined loss is a mean over all samples, and is divided by the number of micro-batches as well."""

    def smaller(self, batches):
        history = backward(self, batches)
        for parameter in self.module.parameters():
            parameter.grad /= len(batches)
        return history

    backward = Trainer._backward
    return patch.object(Trainer, "_backward", smaller)


def redrawn():
    """The re-run draws dropout anew."""

    def dropped(self, x, keys, salt):
        return draw(self, x, keys, salt + 100 * (torch._C._current_graph_task_id() != -1))

    draw = worlds.Small.dropped
    return patch.object(worlds.Small, "dropped", dropped)


def last_only():
    """Only the micro-batch that kept its activations gets gradients."""

    def once(function, *arguments, use_reentrant):
        with torch.no_grad():
            return function(*arguments)

    return patch.object(module, "checkpoint", once)


BUGS = {
    bug.__name__: bug
    for bug in (by_micro_batch, one_by_one, labels_as_read, without_gradient, divided_twice, redrawn, last_only)
}
