"""Recipes: the typed schema, the files, and how a command line becomes an experiment."""
