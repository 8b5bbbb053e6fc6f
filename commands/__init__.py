"""What ``cli.py`` runs: a module a verb, and one for fit, validate, test and predict."""
