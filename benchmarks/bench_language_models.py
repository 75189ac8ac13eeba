"""What evaluations' runs through the language model cost, by class of model.

    python benchmarks/bench_language_models.py [--model py-neox] [--layer 2]

Runs up to the residual stream after a layer (`below`), and on from there (`above`), on each
class in turn, on the same tokens.
"""

import argparse
import platform
from typing import Any, get_args

import torch
from measure import paired_seconds, ratio_of_medians

from saelens_scaffold.evals.model import HookedModel
from saelens_scaffold.models.language_models import (
    ModelClass,
    load_language_model,
    residual_post,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", default="py-neox")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--context_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    models: dict[str, HookedModel] = {}
    for model_class in get_args(ModelClass):
        model: Any = load_language_model(
            args.model, args.device, model_class_name=model_class
        )
        models[model_class] = HookedModel(model, residual_post(model, args.layer))
    torch.manual_seed(0)
    shape = (args.repeats, args.batch_size, args.context_size)
    vocabulary = next(iter(models.values())).model.cfg.d_vocab
    tokens = torch.randint(1, vocabulary, shape, device=args.device)

    def up(hooked: HookedModel) -> Any:
        return lambda batch: hooked.below(batch)

    def up_and_on(hooked: HookedModel) -> Any:
        def run(batch: torch.Tensor) -> None:
            x, start = hooked.below(batch)
            hooked.above(start, x)

        return run

    print(f"{args.model}, layer {args.layer}, {args.batch_size} x {args.context_size}")
    print(f"tokens, {torch.get_num_threads()} threads, {platform.processor() or '-'}")
    print("| class | up to the layer | up and on, from there |\n|---|---:|---:|")
    times = [
        paired_seconds({n: of(m) for n, m in models.items()}, tokens, args.device, 5)
        for of in (up, up_and_on)
    ]
    base = "HookedTransformer"
    for name in models:
        cells = []
        for of in times:
            ratio, low, high = ratio_of_medians(of[base], of[name])
            cells.append(f"{ratio:.2f} x as fast [{low:.2f}, {high:.2f}]")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
