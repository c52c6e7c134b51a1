"""The verbs of `md4`, a file for each group. Heavy imports happen inside the verbs, so that help answers at once."""
