import os

# Nothing that a test does may reach a hub: what loads, loads from local files.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import torch

# The tests' tensors are small: threads cost more than they bring, and pytest-xdist
# uses the other cores.
torch.set_num_threads(1)
