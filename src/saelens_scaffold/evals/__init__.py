"""Evaluations in SAEBench's shape, and what runs them.

A package each, with `eval_config`, `eval_output` and `main`, whose `run_eval` is called as
those of SAEBench are: `dense_latents` and `scaffold_ablation`, and SAEBench's own
`sparse_probing`, `tpp` and `sparse_probing_sae_probes` over several seeds.

They share `run` (skip what is there, write what is new), `selected_saes` (the SAEs and what
is judged of them), `language_model`, `text_data`, `labelled_data`, `bootstrap` and
`over_seeds`. The command `saelens-scaffold eval` is in `command`, `plan` and `table`, with
`registry` for all evaluations by name; `command_line` is that of a single evaluation.
`graphing` and `json_schemas` are for those who read the results.
"""
