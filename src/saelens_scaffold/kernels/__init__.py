"""Sparse kernels: what comes after the encoder's product costs what the active latents cost.

A BatchTopK step keeps k of d_sae latents a token, and plain PyTorch treats the others as
numbers like any other. Here

- `selection` finds the k · N largest pre-activations as the encoder's product is made,
  block by block, so that the (N, d_sae) pre-activations are never held;
- `entries` says which they are, sorted both by token and by latent;
- `sparse_forward` encodes, decodes and goes backward over these entries alone;
- `lazy` shows them to whoever reads `feature_acts` or `hidden_pre` as the dense tensors they
  stand for.

All that touches many numbers goes through the three operations of `torch_ops` (PyTorch's
own, on any device) or `triton_ops` (CUDA); `choice` chooses. The definition that these
are held against in the tests is SAELens's own dense code, which `kernels="reference"` runs.

Nothing here knows of SAEs: tensors come in, tensors go out.
"""
