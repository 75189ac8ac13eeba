"""One SAE trained by several processes, each of which holds a part of the dictionary.

Process p of W holds the scaffold, as all do, and every W-th latent of the dictionary from the
p-th on, with its gradients and Adam's state, which are never sent. Every process reads the
whole batch. A step sends the partial reconstructions, of shape (n_tokens, d_in), and counts
of pre-activations above some cuts, from which all processes learn the same exact cut of
BatchTopK: nothing whose size depends on d_sae.

- `shard`: this process's part, and sums over all processes
- `state`: cuts weights and training state into parts, and joins them
- `largest`: the n largest values over all processes
- `selection`: BatchTopK, and the revival of dead latents, over all processes
- `sae`: the SAEs
- `trainer`: SAELens's trainer for them
"""
