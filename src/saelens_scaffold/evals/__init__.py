"""Evaluations of SAEs in SAEBench's shape, and the pipeline that runs them.

`evaluations.yaml` is the table of all evaluations by name, which `registry` reads into the
data of `base`. `jobs` turns options into jobs, `runner` runs them, and `store` alone knows
which results exist and are current. `saes`, `model`, `data` and `labelled_data` provide what
they read. The evaluations of this package are `dark_matter`, `dense_latents` and
`scaffold_ablation`; `saebench` is the adapter to SAEBench's; `rank` suggests a scaffold's rank.
"""
