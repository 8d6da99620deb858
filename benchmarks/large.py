"""A step of the paper's size on a GPU: ResNet-50 at 512 px and BERT-base, beside plain float32, with the data on the card."""
from itertools import cycle

from accelerate.utils import send_to_device

from .cases import Case, Options, line
from .steps import QUICK, check_steps, two_versions
from .versions import OURS, Trainer, arm_of, inputs_of, pair_trainer, settings_of

SIZE = {"source": "openi", "data": "", "image_size": 512, "image_encoder": "resnet50", "image_weights": "random", "text_encoder": "random",
        "text_layers": 12, "text_hidden": 768, "text_heads": 12, "tokenizer": "train", "max_tokens": 128, "batch_size": 20,
        "declip_queue": 20, "workers": 4, "threads": 0, "lr": 1e-4, "lr_text": 1e-4}
SMALL = QUICK | {"image_encoder": "timm:test_resnet", "text_heads": 2, "declip_queue": 8, "workers": 0, "threads": 1}
STEPS = 100  # in a repetition where the workers must not profit from the other's turn


def looped(trainer: Trainer, count: int):
    "A function that makes a step with the next of some batches that it keeps on the card."
    kept = cycle([send_to_device(next(trainer.batches), trainer.accelerator.device) for _ in range(count)])
    return lambda: trainer(next(kept))


@line("large-declip", "cuda", arm="ours")
@line("large-combined", "cuda", arm="combined")
@line("large-infonce", "cuda", arm="baseline")
def large(options: Options, arm: str) -> Case:
    "In float32 and, as the settings choose on a GPU, in bf16."
    size, count = SIZE | options.pick({}, SMALL), options.pick(40, 12)
    first, trainers, batches = two_versions(options, "openi", arm, count, {"float32": "float32", "auto": "auto"}, **size)
    # The reference pools by [CLS]. From random weights all reports then lie within 1% of one point, which is little more than
    # a rounding of bf16: in this precision the gradients of such a start are noise (a cosine of -0.05 on an H200), in any code.
    return Case(
        "07c8bb8 in float32, eager", looped(first, 3), {name: looped(trainer, 3) for name, trainer in trainers.items()},
        check=lambda: check_steps(first, trainers, batches, direction=None), targets={"auto": 0.35}, rounds=20, warmup=5,
    )


@line("large-declip/infonce", "cuda")
def beside_infonce(options: Options) -> Case:
    "What DeCLIP costs at this size, in our own version."
    settings = settings_of(OURS, options.device, "openi", **SIZE | options.pick({}, SMALL))
    inputs = inputs_of(OURS, settings, options.pick(40, 12))
    infonce, declip = (looped(pair_trainer(OURS, settings, arm_of(OURS, arm), inputs), 3) for arm in ("baseline", "ours"))
    return Case("our InfoNCE", infonce, {"ours": declip}, check=lambda: "not the same work", targets={"ours": 2.3}, precision="auto", warmup=5)


@line("large-waits", "cuda")
def waits(options: Options) -> Case:
    "How long the GPU waits for the images: steps that load, beside steps on batches that are there."
    settings = settings_of(OURS, options.device, "openi", **SIZE | options.pick({}, SMALL))
    inputs, steps = inputs_of(OURS, settings, options.pick(40, 12)), options.pick(STEPS, 2)
    trainer = pair_trainer(OURS, settings, arm_of(OURS, "baseline"), inputs)
    there = looped(trainer, 3)
    return Case(
        "the same steps without loading", lambda: [there() for _ in range(steps)], {"ours": lambda: [trainer() for _ in range(steps)]},
        check=lambda: "the same trainer", targets={"ours": 1.05}, precision="auto", rounds=3, per=steps, unit="a step",
    )
