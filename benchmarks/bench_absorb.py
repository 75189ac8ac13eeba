"""
Peak memory of `saelens-scaffold absorb` at the size of Gemma Scope: d_in 2304, d_sae 65,536.

    python benchmarks/bench_absorb.py

A random JumpReLU SAE, and a random language model of one layer. Beyond the weights: beyond
what a process has that imports the package and loads both.
"""

import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoConfig, AutoModelForCausalLM

from saelens_scaffold.models import embedded_model_path

D_IN, D_SAE = 2304, 65_536
LOAD = """
import sys
from saelens_scaffold.evals.model import load_language_model
from saelens_scaffold.evals.saes import load_saes
kept = load_language_model("model", "cpu"), load_saes(["sae"])
status = open("/proc/self/status").read()
print(status.split("VmRSS:")[1].split()[0])
"""


def write_inputs(folder: Path) -> None:
    """A model and an SAE that fires on about 1 % of its latents."""
    embedded = embedded_model_path()
    config = AutoConfig.from_pretrained(embedded)
    config.update({"hidden_size": D_IN, "num_hidden_layers": 1})
    config.update({"num_attention_heads": 8, "intermediate_size": 256})
    shutil.copytree(embedded, folder / "model")
    for weights in (folder / "model").glob("*.safetensors"):
        weights.unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    hook_name = "blocks.0.hook_resid_post"
    metadata = SAEMetadata(hook_name=hook_name, context_size=64)
    sae = JumpReLUSAE(JumpReLUSAEConfig(D_IN, D_SAE, metadata=metadata))
    sae.b_enc.data.fill_(-2 * float(sae.W_enc.norm(dim=0).mean()))
    sae.save_model(folder / "sae")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder)
        python = [sys.executable, "-c"]
        loaded = subprocess.check_output([*python, LOAD], cwd=folder, text=True)
        argv = [*python[:1], "-m", "saelens_scaffold", "absorb", "sae", "--model"]
        argv += ["model", "--dataset", "python-stdlib", "--output_path", "new"]
        argv += ["--n_tokens", "2400", "--held_out_tokens", "300", "--device", "cpu"]
        subprocess.run(argv, cwd=folder, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    weights, gb = int(loaded), 2**20
    print(f"loaded {weights / gb:.2f} GB, peak {peak / gb:.2f} GB")
    print(f"beyond the weights: {(peak - weights) / gb:.2f} GB")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
