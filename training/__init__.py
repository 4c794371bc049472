"""How the bundled problems and the bundled model were made."""
