"""Scaffold SAEs on the Hugging Face Hub: uploading them, with a model card.

`upload` is the entry point, for Python and for the command line. An `Upload` gathers its
SAEs (`sources`), writes their files, and knows what was found of them (`findings`).
`commits` carries it out or does a dry run, and says what to do when the Hub refuses.
`model_card` writes the card and its figure.
"""
