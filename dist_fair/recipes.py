"""`dist-fair recipes`: lists recipes; `show NAME` prints one resolved, with where each value comes from."""

import argparse
import sys
from collections.abc import Mapping

from dist_fair.cli import guarded
from dist_fair.recipe import cards


def main(arguments: list[str]) -> int:
    """Exit code 0; a DistFairError is left to the caller."""
    parser = argparse.ArgumentParser(prog="dist-fair recipes", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    verbs.add_parser("list", help="recipes, data cards and detector cards (the default)")
    show = verbs.add_parser("show", help="a recipe, resolved")
    show.add_argument("name", help="name of a recipe, or path of a YAML file")
    show.add_argument("overrides", nargs="*", metavar="key=value", help="as for training: a.b=c, +a.b=c, ~a.b")
    verbs.add_parser("keys", help="all keys with their types, defaults and meaning")
    options = parser.parse_args(arguments)
    if options.verb == "show":
        from dist_fair.recipe.composition import load

        choice = options.name if options.name.startswith("recipe=") else f"recipe={options.name}"
        print(load([choice, *options.overrides], interventions()).yaml(), end="")
    elif options.verb == "keys":
        print(schema_help(), end="")
    else:
        print(listing(), end="")
    return 0


def listing() -> str:
    """Names and first comments of all shipped files."""
    lines = []
    for group, folder in cards.GROUPS.items():
        lines.append(f"{group}=NAME")
        for name in cards.names(group):
            first = (cards.shipped(folder) / f"{name}.yaml").read_text().partition("\n")[0]
            lines.append(f"  {name:20}{first.removeprefix('#').strip() if first.startswith('#') else ''}".rstrip())
        lines.append("")
    return "\n".join([*lines, "`dist-fair recipes show NAME` prints a recipe with all its values.", ""])


def interventions() -> Mapping[str, type]:
    """Name -> dataclass of settings of all interventions."""
    from dist_fair.interventions.base import registered

    return {name: kind.Settings for name, kind in registered().items()}


def schema_help() -> str:
    """All keys of a recipe with default, meaning and type."""
    from dist_fair.recipe.typed import Schema

    entries = [entry for entry in Schema(interventions()).describe() if not entry[0].startswith("recipe=")]
    width = max(len(start) for start, _ in entries if len(start) < 50)
    lines = [f"{start:{width}}  {meaning}".rstrip() for start, meaning in entries]
    return "\n".join(["recipe=NAME, data=NAME and detector=NAME choose files; then any of:", "", *lines, ""])


if __name__ == "__main__":
    sys.exit(guarded(main))
