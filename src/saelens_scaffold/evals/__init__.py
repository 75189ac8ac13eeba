"""Evaluations in SAEBench's shape: a package for each, with its `eval_config`,
`eval_output` and `main`, whose `run_eval` is called as those of SAEBench are."""
