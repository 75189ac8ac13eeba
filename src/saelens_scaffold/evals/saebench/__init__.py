"""The adapter to SAEBench: the only place that calls its evaluations.

`passthrough` runs SAEBench's evaluations as they are. `sparse_probing`,
`sparse_probing_sae_probes` and `tpp` run them `over_seeds`. What has to be replaced in
SAEBench and sae-probes for that is listed in `replacements`.
"""
