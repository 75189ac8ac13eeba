"""Scaffold SAEs on the Hugging Face Hub: uploading them, with a model card.

`upload` is the entry point, for Python and for the command line. An `Upload` gathers its
SAEs (`sources`) with what is known of them (`findings`). `commits` carries it out or does a
dry run, and `hub_errors` says what to do when the Hub refuses. `staging` writes the files of
an SAE, `model_card` the card and its figure.
"""
