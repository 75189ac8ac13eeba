"""Scaffold SAEs on the Hugging Face Hub: what goes up, and what comes down.

`validation` says what is wrong with an SAE's files, before anything is sent or memory is
allocated, and knows no other module here; `loading` loads only what passes. `sources`
finds the SAEs to upload, `evaluation_results` and `comparisons` what is known of them.
`staging` writes their files, `facts`, `figure` and `model_card` the card. `upload` puts a
`plan` together, which `dry_run` looks at and `commits` carries out; `hub_errors` says what
to do when the Hub does not do as it is asked. `command` is `saelens-scaffold upload`.
"""
