"""Scaffold SAEs on the Hugging Face Hub: uploading them, with a model card.

`upload` is the entry point, for Python and for the command line. It makes a `plan` of the
SAEs that `sources` finds, with what `facts` and `compare_runs` know of them. A `dry_run`
looks at the plan; `commits` carries it out, and `hub_errors` says what to do when the Hub
refuses. `staging` writes the files of an SAE, `model_card` and `figure` the card.
"""
