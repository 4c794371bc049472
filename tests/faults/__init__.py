"""Faults that a reader can meet; a package, so that its conftest is not the tests' own."""
