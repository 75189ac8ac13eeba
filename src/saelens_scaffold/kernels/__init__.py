"""Sparse kernels: after the encoder's product, the cost is that of the active latents alone.

A BatchTopK step keeps k of d_sae latents per token, and plain PyTorch computes with all of
them. Here

- `selection` finds the k · N largest pre-activations while the encoder's product is
  computed block by block, so that the (N, d_sae) pre-activations are never held;
- `entries` lists them, sorted both by token and by latent;
- `sparse_forward` encodes, decodes and goes backward over these entries alone;
- `lazy` presents them as the dense tensors `feature_acts` and `hidden_pre`.

All heavy work goes through the three operations of `torch_ops` (PyTorch, on any device) or
`triton_ops` (CUDA), which `choice` selects. Tests compare them with SAELens's dense code,
which `kernels="reference"` runs.

Nothing here depends on SAEs: all inputs and outputs are tensors.
"""
